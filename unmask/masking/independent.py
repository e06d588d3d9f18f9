"""Batches that depend on nothing that the model says."""

from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from unmask.data.stream import ExampleStream
from unmask.masking.process import Requirements, RowShard
from unmask.types import MaskedBatch, TokenStats


class IndependentBatches(ABC):
    """A process whose batch is a function of the step: every step takes new examples.

    Batches are made on the CPU, the next one in a background thread where `device` is another, so that no step waits
    for its data, and none for the device.
    """

    requirements = Requirements()

    def __init__(self, *, shard: RowShard, seed: int = 0, device: torch.device | str | None = None) -> None:
        self.shard = shard
        self.seed = seed
        self.device = torch.device(device or "cpu")
        self.step = 0
        is_idle = self.device.type != "cpu"  # else a thread would only take cores from the step
        self._reader = ThreadPoolExecutor(1, "batches") if is_idle else None
        self._ahead: tuple[ExampleStream, int, Future[MaskedBatch]] | None = None

    @abstractmethod
    def _make(self, stream: ExampleStream, step: int) -> MaskedBatch:
        """The batch of `step`, on the CPU."""

    @property
    def examples_seen(self) -> int:
        return self.step * self.shard.known

    def next_batch(self, stream: ExampleStream) -> MaskedBatch:
        """The batch of this step, until `observe` ends it. The loss is `sum(weight * nll) / B`."""
        batch = self._read(stream)
        if self._reader is not None:
            self._ahead = stream, self.step + 1, self._reader.submit(self._make, stream, self.step + 1)
        return self._agree(batch).to(self.device)

    def _agree(self, batch: MaskedBatch) -> MaskedBatch:
        """What all processes must know before a batch can be used; `_make`, in the thread, cannot ask them."""
        return batch

    def _read(self, stream: ExampleStream) -> MaskedBatch:
        """The batch of this step: the one made ahead, unless this is the first step here, or another stream."""
        if self._ahead is not None and self._ahead[:2] == (stream, self.step):
            return self._ahead[2].result()
        return self._make(stream, self.step)

    def observe(self, batch: MaskedBatch, stats: TokenStats) -> None:
        """The step is over; what the model said of it changes nothing."""
        self.step += 1

    def metrics(self) -> dict[str, float]:
        """Named values for the log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that the next batches depend on."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`, bit for bit."""
        self.step = state["step"]
