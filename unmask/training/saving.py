"""Saves a run's state in a thread, while training goes on."""

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
    """A run's counters and best evaluation, saved beside the trainer's state."""

    step: int = 0
    seconds: float = 0.0
    """Seconds spent in training steps, without evaluation and saving."""
    metrics_position: int = 0
    """Length of `metrics.jsonl` in bytes."""
    skips: int = 0
    """Number of steps whose update was skipped, because loss or gradient was not finite."""
    evaluated_step: int = 0
    """Last step that was evaluated; if an evaluation was due since, the resumed run makes it first."""
    best_step: int | None = None
    best_score: float = -math.inf
    best_nelbo: float = math.inf

    def is_better(self, score: float, nelbo: float) -> bool:
        """True if this evaluation is the best so far: by accuracy, and at equal accuracy (0, early on) by NELBO."""
        return (score, -nelbo) > (self.best_score, -self.best_nelbo)


class Background:
    """A thread for one piece of work at a time. The next call of `start`, `check` or `wait` raises its error."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Starts `work` once the work before it is done."""
        self.wait()
        self._thread = threading.Thread(target=self._do, args=(work,), daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises the error of the work, if there is one. Does not wait: cheap enough for every step."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Waits until the work is done, and raises its error."""
        self.join()
        self.check()

    def join(self) -> None:
        """Waits until the work is done, and raises nothing: for cleaning up after another error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _do(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:  # raised in the training thread instead, by `check`
            self._error = error


class Saver(Background):
    """A background thread that writes copies of a run's state.

    Args:
        folder: the folder of all checkpoints.
        train: settings that say which of them to keep.
        writers: the processes that write each checkpoint together, at the same steps.
    """

    def __init__(self, folder: Path, train: TrainConfig, writers: Peers) -> None:
        super().__init__()
        self.folder, self.train, self.writers = folder, train, writers
        self.whole_step: int | None = None
        """Step of the newest checkpoint that is known to be complete on the disk."""

    def save(self, state: dict[str, Any], progress: Progress, metrics: MetricsFile | None) -> None:
        """Copies `state` and `progress` as they are now, and starts to write them; records the length of `metrics`."""
        self.wait()  # at most one copy at a time
        if metrics is not None:
            progress.metrics_position = metrics.position
        copied = checkpoint.snapshot(state | {"progress": asdict(progress)})
        self.start(partial(self._write, progress.step, copied, progress.best_step, metrics))

    def _write(self, step: int, state: dict[str, Any], best_step: int | None, metrics: MetricsFile | None) -> None:
        # First the lines before this checkpoint: it records their number, and must not outlive them.
        if metrics is not None:
            metrics.sync()
        checkpoint.save(self.folder, step, state, self.writers)
        self.whole_step = step
        if self.writers.is_main:
            keep = set() if best_step is None else {best_step}
            checkpoint.prune(self.folder, keep_last=self.train.keep_last, keep_every=self.train.keep_every, keep=keep)
