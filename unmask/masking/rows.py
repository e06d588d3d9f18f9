"""The rows of a pool: which examples, how far each block has come, what is masked.

Dimensions: B rows of the global batch, b rows of this process, N blocks of a row (1 in plain diffusion), S positions of
a block, L of a row.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from unmask.blocks import blocks_of, in_blocks, over_positions
from unmask.masking.random import mask_exactly
from unmask.noise import Purpose
from unmask.types import CleanBatch


@dataclass(kw_only=True)
class PoolRows:
    """The state of this process's rows. Row r of the global batch holds the examples r, r + B, r + 2 B, … in turn."""

    example: Int[Tensor, "b"]
    visit: Int[Tensor, "b"]
    """Steps that the row's example has been trained on."""
    stage: Int[Tensor, "b N"]
    x0: Int[Tensor, "b L"]
    prompt_mask: Bool[Tensor, "b L"]
    is_masked: Bool[Tensor, "b L"]

    @property
    def is_done(self) -> Bool[Tensor, "b"]:
        """Where the row takes its next example before the next step: no block has anything left to learn from."""
        return ~self.is_masked.any(dim=-1)

    @property
    def num_blocks(self) -> int:
        return self.stage.shape[1]

    def in_blocks(self, values: Shaped[Tensor, "b L"]) -> Shaped[Tensor, "b N S"]:
        return in_blocks(values, self.num_blocks)

    @property
    def masked(self) -> Bool[Tensor, "b N S"]:
        """`is_masked`, in blocks."""
        return self.in_blocks(self.is_masked)

    @property
    def eligible(self) -> Bool[Tensor, "b N S"]:
        """What may be masked, in blocks."""
        return self.in_blocks(~self.prompt_mask)

    @property
    def num_maskable(self) -> Int[Tensor, "b N"]:
        """L_b of each block. Padding counts: the answer's own length is hidden."""
        return self.eligible.sum(dim=-1)

    @property
    def num_revealed(self) -> Int[Tensor, "b N"]:
        return self.num_maskable - self.masked.sum(dim=-1)

    @property
    def block_visit(self) -> Int[Tensor, "b N"]:
        """`visit N + n`: what keys the draws of block n, beside the example."""
        return blocks_of(self.visit, self.num_blocks)

    def xt(self, mask_id: int) -> Int[Tensor, "b L"]:
        return torch.where(self.is_masked, mask_id, self.x0)

    def reveal(self, is_revealed: Bool[Tensor, "b L"]) -> None:
        """New tensors, not changes in place: batches and saved states hold on to the old ones."""
        self.is_masked = self.is_masked & ~is_revealed

    def finish(self, is_done: Bool[Tensor, "b N"]) -> None:
        """Shows the whole of these blocks."""
        self.reveal(over_positions(is_done, self.x0.shape[1]))

    def replaced_where_done(self, fresh: "PoolRows") -> "PoolRows":
        row = self.is_done
        return PoolRows(
            **{
                name: torch.where(row if value.ndim == 1 else row.unsqueeze(1), getattr(fresh, name), value)
                for name, value in vars(self).items()
            }
        )


def new_rows(
    clean: CleanBatch,
    example: Int[Tensor, "b"],
    stage: Int[Tensor, "b N"],
    num_revealed: Int[Tensor, "b N"],
    seed: int,
) -> PoolRows:
    """Examples that enter a pool, positions revealed at random: the model has not seen them yet."""
    eligible = in_blocks(~clean.prompt_mask, stage.shape[1])
    is_masked = mask_exactly(eligible, eligible.sum(dim=-1) - num_revealed, example, seed, Purpose.MASK)
    return PoolRows(
        example=example,
        visit=torch.zeros_like(example),
        stage=stage,
        x0=clean.x0,
        prompt_mask=clean.prompt_mask,
        is_masked=is_masked.flatten(1),
    )
