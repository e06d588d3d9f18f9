"""Where a run's numbers go: metrics.jsonl, TensorBoard, and the terminal."""

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unmask.progress import console, warn

_PLAIN_INTERVAL = 30.0  # seconds between lines where stderr is not a terminal


class MetricsFile:
    """Append-only JSON lines. Checkpoints hold the position: on resume, what a lost run wrote after it is cut off."""

    def __init__(self, path: Path, position: int) -> None:
        path.touch()
        size = path.stat().st_size
        if size < position:
            warn(f"{path}: shorter than when the checkpoint was made; lines are lost")
        self._file = path.open("r+", encoding="utf-8")
        self._file.truncate(min(position, size))
        self._file.seek(0, os.SEEK_END)

    def synced_position(self) -> int:
        """Where the next line goes; all before it is on the disk."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


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
