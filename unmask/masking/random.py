"""Masks drawn independently of the model: the standard masked diffusion baseline, and its version in blocks (BD3-LM).

Dimensions: b rows of this process, N blocks of a row (1 in plain diffusion), S positions of a block, L of a row.
"""

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from unmask import noise
from unmask.blocks import count_blocks, in_blocks
from unmask.data.stream import ExampleStream
from unmask.masking import weights
from unmask.masking.independent import IndependentBatches
from unmask.masking.process import ProcessContext, Requirements, RowShard, score_masked
from unmask.masking.time import TimeDensity, UniformTime, masked_count, stratified
from unmask.noise import Purpose
from unmask.reveal import surest
from unmask.section import Section
from unmask.types import CleanBatch, MaskedBatch

BLOCK_SIZE = "S: blocks of S positions, each predicted from the clean blocks before it; null = the row is one block"


class RandomMasking(IndependentBatches):
    """Every step takes new examples and masks n = ceil(t L_b) of each block, chosen uniformly (see `mask_blocks`).

    With uniform t this is the NELBO per maskable token (see `weights.per_masked`).
    """

    class Config(Section):
        name: str = "uniform"
        block_size: int | None = Field(None, ge=1, description=BLOCK_SIZE)

    def __init__(
        self,
        *,
        mask_id: int,
        shard: RowShard,
        time: TimeDensity | None = None,
        block_size: int | None = None,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(shard=shard, seed=seed, device=device)
        self.mask_id = mask_id
        self.time = time or UniformTime()
        self.block_size = block_size
        self.requirements = Requirements(block_size=block_size)

    @classmethod
    def from_config(cls, config: Config, context: ProcessContext) -> "RandomMasking":
        count_blocks(context.tokens.length, config.block_size)  # refuses what does not divide
        return cls(
            mask_id=context.tokens.mask_id,
            shard=context.shard,
            block_size=config.block_size,
            seed=context.seed,
            device=context.device,
        )

    def _make(self, stream: ExampleStream, step: int) -> MaskedBatch:
        rows = self.shard.index(torch.device("cpu"))
        example = step * self.shard.total + rows
        clean = stream[example]
        num_blocks = count_blocks(clean.x0.shape[1], self.block_size)
        t = stratified(self.time, rows, self.shard.total, self.seed, step, num_blocks)
        return mask_blocks(clean, t, example, self.mask_id, self.seed)


def mask_blocks(
    clean: CleanBatch, t: Float[Tensor, "b N"], example: Int[Tensor, "b"], mask_id: int, seed: int, *keys: int
) -> MaskedBatch:
    """Masks n = ceil(t L_b) of the L_b maskable positions of each block; weight `weights.per_masked`."""
    eligible = in_blocks(~clean.prompt_mask, t.shape[1])
    is_masked = mask_exactly(eligible, masked_count(t, eligible.sum(dim=-1)), example, seed, Purpose.MASK, *keys)
    xt = torch.where(is_masked.flatten(1), mask_id, clean.x0)
    return score_masked(clean.x0, xt, mask_id, weights.per_masked(is_masked, eligible))


def mask_exactly(
    eligible: Bool[Tensor, "b N S"],
    count: Int[Tensor, "b N"],
    example: Int[Tensor, "b"],
    seed: int,
    purpose: Purpose,
    *keys: int,
) -> Bool[Tensor, "b N S"]:
    """`count` eligible positions of each block, every set of that size equally likely; noise keyed by the example."""
    position = torch.arange(eligible[0].numel(), device=eligible.device)
    score = noise.uniform(seed, purpose, *keys, example.unsqueeze(1), position)
    return surest(in_blocks(score, eligible.shape[1]), eligible, count)
