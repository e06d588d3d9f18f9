"""Checkpoints that are written while the run goes on."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from unmask.config import TrainConfig
from unmask.peers import Peers
from unmask.training import checkpoint
from unmask.training.background import Background
from unmask.training.metrics import MetricsFile
from unmask.training.state import Progress


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
