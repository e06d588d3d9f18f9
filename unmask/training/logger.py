"""Where a run's numbers go beside metrics.jsonl: TensorBoard and the terminal."""

import time
from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unmask.progress import console

_PLAIN_INTERVAL = 30.0  # seconds between lines where stderr is not a terminal


class Board:
    """TensorBoard, where it is asked for. Imported late: it takes a second."""

    def __init__(self, folder: Path, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=last_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class StepDisplay:
    """A progress bar with loss, speed and time left; plain lines where stderr is not a terminal."""

    def __init__(self, title: str, first_step: int, num_steps: int) -> None:
        self._title, self._num_steps = title, num_steps
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=num_steps, completed=first_step, loss="-", speed="")
        self._last_line = time.monotonic()

    def __enter__(self) -> "StepDisplay":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, step: int, seconds_per_step: float) -> None:
        self._bar.update(self._task, completed=step, speed=f"{seconds_per_step:.3f} s/step")

    def loss(self, step: int, loss: float) -> None:
        self._bar.update(self._task, loss=f"{loss:.4f}")
        if not console.is_terminal and time.monotonic() - self._last_line > _PLAIN_INTERVAL:
            self._last_line = time.monotonic()
            console.print(f"{self._title}  step {step}/{self._num_steps}  loss {loss:.4f}")
