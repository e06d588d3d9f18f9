"""Saves a run's state in a thread, while training goes on."""

import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from unmask.config.run import TrainConfig
from unmask.peers import Peers
from unmask.training import checkpoint
from unmask.training.logging import MetricsFile
from unmask.training.state import Progress


class Saver:
    """Writes copies of a run's state in a thread. The next call of `save`, `check` or `wait` raises its error.

    Args:
        folder: the folder of all checkpoints.
        train: settings that say which of them to keep.
        writers: the processes that write each checkpoint together, at the same steps.
    """

    def __init__(self, folder: Path, train: TrainConfig, writers: Peers) -> None:
        self.folder, self.train, self.writers = folder, train, writers
        self.whole_step: int | None = None
        """Step of the newest checkpoint that is known to be complete on the disk."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: dict[str, Any], progress: Progress, metrics: MetricsFile | None) -> None:
        """Copies `state` and `progress` as they are now, and starts to write them; records the length of `metrics`."""
        self.wait()  # at most one copy at a time
        if metrics is not None:
            progress.metrics_position = metrics.position
        copied = checkpoint.snapshot(state | {"progress": asdict(progress)})
        self._start(partial(self._write, progress.step, copied, progress.best_step, metrics))

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

    def what_is_left(self) -> str:
        """Says that an error ends the run, and from where it can go on."""
        if self.whole_step is None:
            return "The run stops; it has no checkpoint yet. When this is mended, start again with --resume"
        newest = f"its newest checkpoint is of step {self.whole_step}"
        return f"The run stops; {newest}. When this is mended, continue with --resume"

    def _start(self, work: Callable[[], object]) -> None:
        self._thread = threading.Thread(target=self._do, args=(work,), daemon=True)
        self._thread.start()

    def _do(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:  # raised in the training thread instead, by `check`
            self._error = error

    def _write(self, step: int, state: dict[str, Any], best_step: int | None, metrics: MetricsFile | None) -> None:
        # First the lines before this checkpoint: it records their number, and must not outlive them.
        if metrics is not None:
            metrics.sync()
        checkpoint.save(self.folder, step, state, self.writers)
        self.whole_step = step
        if self.writers.is_main:
            keep = set() if best_step is None else {best_step}
            checkpoint.prune(self.folder, keep_last=self.train.keep_last, keep_every=self.train.keep_every, keep=keep)
