"""Masks drawn independently of the model: the standard masked diffusion baseline.

Dimensions: b rows of this process, L positions.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unmask import noise
from unmask.config import Section
from unmask.data.stream import ExampleStream
from unmask.masking import weights
from unmask.masking.process import ProcessContext, Requirements, RowShard, score_masked
from unmask.masking.time import TimeDensity, UniformTime, masked_count, stratified
from unmask.noise import Purpose
from unmask.reveal import surest
from unmask.types import MaskedBatch, TokenStats


class RandomMasking:
    """Every step takes new examples and masks n = ceil(t L_eff) of each, chosen uniformly; weight 1/n per masked token.

    With uniform t this is the NELBO per maskable token (see `weights.per_masked`).

    Batches are made on the CPU, the next one in a background thread where `device` is another: they depend on nothing
    that the model says, so that no step waits for its data, and none for the device.
    """

    requirements = Requirements()

    class Config(Section):
        name: str = "uniform"

    def __init__(
        self,
        *,
        mask_id: int,
        shard: RowShard,
        time: TimeDensity | None = None,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.mask_id = mask_id
        self.shard = shard
        self.time = time or UniformTime()
        self.seed = seed
        self.device = device or torch.device("cpu")
        self.step = 0
        is_idle = self.device.type != "cpu"  # else a thread would only take cores from the step
        self._reader = ThreadPoolExecutor(1, "batches") if is_idle else None
        self._ahead: tuple[ExampleStream, int, Future[MaskedBatch]] | None = None

    @classmethod
    def from_config(cls, config: Config, context: ProcessContext) -> "RandomMasking":
        return cls(mask_id=context.tokens.mask_id, shard=context.shard, seed=context.seed, device=context.device)

    @property
    def examples_seen(self) -> int:
        return self.step * self.shard.size

    def next_batch(self, stream: ExampleStream) -> MaskedBatch:
        batch = self._read(stream)
        if self._reader is not None:
            self._ahead = stream, self.step + 1, self._reader.submit(self._make, stream, self.step + 1)
        return batch.to(self.device)

    def _read(self, stream: ExampleStream) -> MaskedBatch:
        """The batch of this step: the one made ahead, unless this is the first step here, or another stream."""
        if self._ahead is not None and self._ahead[:2] == (stream, self.step):
            return self._ahead[2].result()
        return self._make(stream, self.step)

    def _make(self, stream: ExampleStream, step: int) -> MaskedBatch:
        rows = self.shard.index(torch.device("cpu"))
        example = step * self.shard.total + rows
        clean = stream[example]
        t = stratified(self.time, rows, self.shard.total, self.seed, step)
        eligible = ~clean.prompt_mask
        count = masked_count(t, eligible.sum(dim=-1))
        is_masked = mask_exactly(eligible, count, example, self.seed, Purpose.MASK)
        xt = torch.where(is_masked, self.mask_id, clean.x0)
        return score_masked(clean.x0, xt, self.mask_id, weights.per_masked(is_masked))

    def observe(self, batch: MaskedBatch, stats: TokenStats) -> None:
        self.step += 1

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def mask_exactly(
    eligible: Bool[Tensor, "b L"],
    count: Int[Tensor, "b"],
    example: Int[Tensor, "b"],
    seed: int,
    purpose: Purpose,
    *keys: int,
) -> Bool[Tensor, "b L"]:
    """`count` eligible positions of each row, every set of that size equally likely; noise keyed by the example."""
    position = torch.arange(eligible.shape[1], device=eligible.device)
    score = noise.uniform(seed, purpose, *keys, example.unsqueeze(1), position)
    return surest(score, eligible, count)
