"""Checkpoints that are written while the run goes on.

What a run remembers of its way.

Work that is done while training goes on.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from unmask.config.run import TrainConfig
from unmask.peers import Peers
from unmask.training import checkpoint
from unmask.training.logging import MetricsFile


@dataclass
class Progress:
    """What a run knows of itself beside the trainer's state; saved with it."""

    step: int = 0
    seconds: float = 0.0
    """Of training: evaluation and saving apart."""
    metrics_position: int = 0
    """How long `metrics.jsonl` was."""
    skips: int = 0
    """Steps whose update was left out, because their numbers were bad."""
    evaluated_step: int = 0
    """The last one; a run that was stopped when an evaluation was due owes it."""
    best_step: int | None = None
    best_score: float = -math.inf
    best_nelbo: float = math.inf

    def is_better(self, score: float, nelbo: float) -> bool:
        """By accuracy; where that is equal (0, early on or always), by NELBO."""
        return (score, -nelbo) > (self.best_score, -self.best_nelbo)


class Background:
    """Does one piece of work at a time in a thread. Its error is raised by the next call of a method but `join`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begins `work` as soon as what came before is done."""
        self.wait()
        self._thread = threading.Thread(target=self._do, args=(work,), daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Costs nothing: for every step."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until all is done."""
        self.join()
        self.check()

    def join(self) -> None:
        """As `wait`, and raises nothing: for when something else has gone wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _do(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error


class Saver(Background):
    """Takes a copy of a run's state, and writes it in a thread.

    Args:
        folder: of all checkpoints.
        train: which of them are kept.
        writers: the processes that write each checkpoint together; all of them save at the same steps.
    """

    def __init__(self, folder: Path, train: TrainConfig, writers: Peers) -> None:
        super().__init__()
        self.folder, self.train, self.writers = folder, train, writers
        self.whole_step: int | None = None
        """Of the newest checkpoint that is known to be on the disk."""

    def save(self, state: dict[str, Any], progress: Progress, metrics: MetricsFile | None) -> None:
        """All that matters, at this step; the main process tells `progress` how far `metrics` has come."""
        self.wait()  # at most one copy at a time
        if metrics is not None:
            progress.metrics_position = metrics.position
        copied = checkpoint.snapshot(state | {"progress": asdict(progress)})
        self.start(partial(self._write, progress.step, copied, progress.best_step, metrics))

    def _write(self, step: int, state: dict[str, Any], best_step: int | None, metrics: MetricsFile | None) -> None:
        if metrics is not None:
            metrics.sync()
        checkpoint.save(self.folder, step, state, self.writers)
        self.whole_step = step
        if self.writers.is_main:
            keep = set() if best_step is None else {best_step}
            checkpoint.prune(self.folder, keep_last=self.train.keep_last, keep_every=self.train.keep_every, keep=keep)
