"""A run's numbers: `metrics.jsonl`, TensorBoard, the terminal, and steps whose loss or gradient is not finite.

A run only ever adds lines to `metrics.jsonl`. A resumed run goes on from its checkpoint, and the lines written since
the checkpoint no longer count: a line with the key `resumed_at_byte` cancels all lines from that byte up to itself.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unmask import files
from unmask.config.run import RunConfig, TrainConfig
from unmask.formats import to_json
from unmask.peers import Peers
from unmask.progress import console, warn
from unmask.training import trackers
from unmask.training.trainer import StepReport
from unmask.types import AsyncCopy

RESUMED = "resumed_at_byte"
"""Key of a line that cancels all lines from that byte up to itself."""

_PLAIN_INTERVAL = 30.0  # seconds between lines where stderr is not a terminal


class MetricsFile:
    """The file `metrics.jsonl` of a run, open for writing at its end."""

    def __init__(self, path: Path, position: int, head: dict[str, Any]) -> None:
        """Cancels the lines after byte `position`, in a line that begins with `head`, the state of the run there."""
        self.path = path
        size = path.stat().st_size if path.exists() else 0
        if size < position:
            warn(f"{path}: shorter than when the checkpoint was made; lines are lost")
        is_cut_short = size > 0 and not _ends_a_line(path)
        self._file = path.open("ab", buffering=0)
        files.sync(path.parent)  # a new file's name is on the disk only after this
        if is_cut_short:  # a process died within a line; what follows must not join it
            files.append(self._file, b"\n")
        if size > position:
            self.write(head | {RESUMED: position})

    @property
    def position(self) -> int:
        """Returns the byte at which the next line starts."""
        return self._file.tell()

    def sync(self) -> None:
        """Waits until all lines are on the disk."""
        files.sync(self.path)

    def write(self, line: dict[str, Any]) -> None:
        """Adds a line."""
        files.append(self._file, to_json(line).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


def lines_that_count(content: bytes) -> Iterator[tuple[int, str]]:
    """Yields number (from 1) and text of each line of a `metrics.jsonl` that no resumed run has cancelled."""
    kept: list[tuple[int, int, bytes]] = []
    start = 0
    for number, line in enumerate(content.split(b"\n"), start=1):
        position = _resumed_at(line)
        if position is None:
            kept.append((start, number, line))
        while position is not None and kept and kept[-1][0] >= position:
            kept.pop()
        start += len(line) + 1
    for _, number, line in kept:
        yield number, line.decode(errors="replace")


def _resumed_at(line: bytes) -> int | None:
    """Returns the byte from which the line cancels others, or None."""
    if RESUMED.encode() not in line:
        return None
    try:
        position = files.parse_object(line).get(RESUMED)
    except ValueError:
        return None
    return position if type(position) is int and position >= 0 else None


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"


class TensorBoardWriter:
    """A writer of TensorBoard's event files."""

    def __init__(self, folder: Path, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._writer = SummaryWriter(folder, purge_step=last_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


Logger = TensorBoardWriter | trackers.Tracker


def open_loggers(config: RunConfig, folder: Path, step: int) -> Iterator[Logger]:
    """Opens what else the section `log` sends the numbers of the run in `folder` to, which is at `step`."""
    log = config.log
    if log.tensorboard:
        yield TensorBoardWriter(folder / "tensorboard", step)
    if log.to:
        own, settings = trackers.tracker_id(folder), config.model_dump(mode="json")
        about = trackers.RunInfo(project=log.project, name=folder.name, id=own, folder=folder, config=settings)
        yield from (trackers.Tracker(name, about) for name in log.to)


class StepDisplay:
    """A progress bar with loss, speed and time left; plain lines where stderr is not a terminal."""

    def __init__(self, title: str, first_step: int, num_steps: int) -> None:
        self._title, self._num_steps = title, num_steps
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
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


@dataclass(frozen=True)
class BadStep:
    """A step with a loss or gradient that is not finite; it has left weights and moments as they were."""

    step: int
    report: StepReport

    def ranks(self, peers: Peers) -> list[int]:
        """Returns the ranks whose own losses are not finite; all ranks if only the gradient is not. Collective."""
        weighted = self.report.stats.nll.detach() * self.report.batch.weight
        is_own = not bool(weighted.isfinite().all())
        found = [rank for rank, is_bad in enumerate(peers.exchange(is_own)) if is_bad]
        return found or list(range(peers.size))

    def path(self, run: Path, rank: int, peers: Peers) -> Path:
        suffix = f"_rank_{rank}" if peers.size > 1 else ""
        return run / "bad_batches" / f"step_{self.step:08d}{suffix}.safetensors"

    def keep(self, run: Path, peers: Peers) -> None:
        """Writes this process's batch and its statistics to `RUN/bad_batches/`."""
        path = self.path(run, peers.rank, peers)
        files.make_folder(path.parent)
        batch, stats = self.report.batch, self.report.stats
        tensors = {"x0": batch.x0, "xt": batch.xt, "scored": batch.scored, "weight": batch.weight}
        tensors |= {"nll": stats.nll, "top1": stats.top1}
        files.put_tensors(path, tensors)

    def in_words(self, run: Path, ranks: list[int], peers: Peers) -> str:
        where = f"step {self.step}" + (f", rank {', '.join(map(str, ranks))}" if peers.size > 1 else "")
        loss, norm = self.report.loss.item(), self.report.grad_norm.item()
        path = self.path(run, ranks[0], peers)
        return f"{where}: the loss is {loss}, the gradient's norm {norm}; its batch is in {path}"


class NonFiniteMonitor:
    """A watch for bad steps: on a CPU it reports each at once, on a GPU once the next step is under way."""

    def __init__(self) -> None:
        self._open: tuple[BadStep, AsyncCopy] | None = None

    def add(self, step: int, report: StepReport) -> list[BadStep]:
        """Adds a step; returns the steps that are now known to be bad."""
        known = self.collect()
        self._open = BadStep(step, report), AsyncCopy(report.is_bad)
        return known if report.is_bad.is_cuda else [*known, *self.collect()]

    def collect(self) -> list[BadStep]:
        """Waits for the step that is still open; returns it if it was bad."""
        if self._open is None:
            return []
        step, flag = self._open
        self._open = None
        return [step] if flag.wait() else []


def way_on(train: TrainConfig, run: Path, *, has_checkpoint: bool) -> str:
    """Says how to go on after a bad step that has ended the run in the folder `run`."""
    start = "a lower optim.lr or train.dtype=float32"
    if has_checkpoint:
        start = f"train.init={run} and {start}"
    if train.on_bad_numbers == "skip":
        return f"That is one more than train.max_skips={train.max_skips}: start a new run, with {start}"
    if not has_checkpoint:
        return f"There is no checkpoint yet: start a new run with {start}, or with train.on_bad_numbers=skip"
    return f"Go on without such steps with --resume train.on_bad_numbers=skip, or start a new run with {start}"
