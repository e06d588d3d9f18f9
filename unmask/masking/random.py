"""Masks drawn independently of the model: the standard masked diffusion baseline.

Dimensions: b rows of this process, L positions.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unmask import noise
from unmask.config import Section
from unmask.data.stream import ExampleStream
from unmask.masking import weights
from unmask.masking.independent import IndependentBatches
from unmask.masking.process import ProcessContext, RowShard, score_masked
from unmask.masking.time import TimeDensity, UniformTime, masked_count, stratified
from unmask.noise import Purpose
from unmask.reveal import surest
from unmask.types import MaskedBatch


class RandomMasking(IndependentBatches):
    """Every step takes new examples and masks n = ceil(t L_eff) of each, chosen uniformly; weight 1/n per masked token.

    With uniform t this is the NELBO per maskable token (see `weights.per_masked`).
    """

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
        super().__init__(shard=shard, seed=seed, device=device)
        self.mask_id = mask_id
        self.time = time or UniformTime()

    @classmethod
    def from_config(cls, config: Config, context: ProcessContext) -> "RandomMasking":
        return cls(mask_id=context.tokens.mask_id, shard=context.shard, seed=context.seed, device=context.device)

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
