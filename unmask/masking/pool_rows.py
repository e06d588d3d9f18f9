"""The rows of a pool: their state, how new ones begin, and what saved ones must hold.

Dimensions: b rows of this process, N blocks of a row (1 in plain diffusion), S positions of a block, L of a row.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from unmask.blocks import blocks_of, count_blocks, in_blocks
from unmask.errors import UserError
from unmask.masking.process import LARGEST_COUNT
from unmask.masking.uniform import mask_exactly
from unmask.types import CleanBatch, TokenSpec, to_device


@dataclass(kw_only=True)
class PoolRows:
    """The state of this process's rows. Its tensors are replaced, never changed in place: batches and saved states
    hold on to the old ones."""

    example: Int[Tensor, "b"]
    visit: Int[Tensor, "b"]
    """Steps that the row's example has been trained on."""
    stage: Int[Tensor, "b N"]
    x0: Int[Tensor, "b L"]
    prompt_mask: Bool[Tensor, "b L"]
    is_masked: Bool[Tensor, "b L"]

    @property
    def is_done(self) -> Bool[Tensor, "b"]:
        """True where no block has anything left to learn from: the row takes its next example before the next step."""
        return ~self.is_masked.any(dim=-1)

    @property
    def num_blocks(self) -> int:
        """N."""
        return self.stage.shape[1]

    def in_blocks(self, values: Shaped[Tensor, "b L"]) -> Shaped[Tensor, "b N S"]:
        """Views `values` block by block."""
        return in_blocks(values, self.num_blocks)

    @property
    def masked(self) -> Bool[Tensor, "b N S"]:
        """`is_masked`, in blocks."""
        return self.in_blocks(self.is_masked)

    @property
    def eligible(self) -> Bool[Tensor, "b N S"]:
        """True where a position may be masked, in blocks."""
        return self.in_blocks(~self.prompt_mask)

    @property
    def num_maskable(self) -> Int[Tensor, "b N"]:
        """L_b of each block. Padding counts: the answer's own length is hidden."""
        return self.eligible.sum(dim=-1)

    @property
    def num_revealed(self) -> Int[Tensor, "b N"]:
        """Visible ones of each block's L_b maskable positions."""
        return self.num_maskable - self.masked.sum(dim=-1)

    @property
    def block_visit(self) -> Int[Tensor, "b N"]:
        """`visit N + n`, the key of block n's draws beside the example."""
        return blocks_of(self.visit, self.num_blocks)

    def xt(self, mask_id: int) -> Int[Tensor, "b L"]:
        """Returns the canvases: `x0`, with `mask_id` where masked."""
        return torch.where(self.is_masked, mask_id, self.x0)


def new_rows(
    clean: CleanBatch,
    example: Int[Tensor, "b"],
    stage: Int[Tensor, "b N"],
    num_revealed: Int[Tensor, "b N"],
    seed: int,
) -> PoolRows:
    """Makes rows of new examples, with positions revealed at random: the model has not seen them yet.

    `example` may be on the CPU; all else is where the rows are to be.
    """
    example = to_device(example, clean.x0.device)
    eligible = in_blocks(~clean.prompt_mask, stage.shape[1])
    is_masked = mask_exactly(eligible, eligible.sum(dim=-1) - num_revealed, example, seed)
    return PoolRows(
        example=example,
        visit=torch.zeros_like(example),
        stage=stage,
        x0=clean.x0,
        prompt_mask=clean.prompt_mask,
        is_masked=is_masked.flatten(1),
    )


def check_rows(saved: Any, rows: int, block_size: int | None, tokens: TokenSpec) -> None:
    """Checks saved rows of a pool: their names, shapes, formats and values.

    Raises:
        UserError: they are damaged, or of another pool; names the field.
    """
    length = tokens.length
    blocks = (rows, count_blocks(length, block_size))
    expected: dict[str, tuple[tuple[int, ...], int]] = {
        "example": ((rows,), LARGEST_COUNT),
        "visit": ((rows,), LARGEST_COUNT),
        "stage": (blocks, LARGEST_COUNT),
        "x0": ((rows, length), tokens.vocab_size - 1),
        "prompt_mask": ((rows, length), 1),
        "is_masked": ((rows, length), 1),
    }
    if not isinstance(saved, dict) or saved.keys() != expected.keys():
        found = ", ".join(map(str, saved)) if isinstance(saved, dict) else str(saved)
        raise UserError(f"pool: holds {found[:200]}; a pool has {', '.join(expected)}")
    for name, (shape, most) in expected.items():
        value, dtype = saved[name], torch.bool if name in ("prompt_mask", "is_masked") else torch.long
        if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype != dtype:
            found = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else str(value)[:40]
            raise UserError(f"pool.{name}: is {found}, here {shape} of {dtype}; is it this run's?")
        least, largest = (int(end) for end in torch.aminmax(value.int() if dtype == torch.bool else value))
        if least < 0 or largest > most:
            raise UserError(f"pool.{name}: holds {least if least < 0 else largest}, not from 0 to {most}")
    if bool((saved["is_masked"] & saved["prompt_mask"]).any()):
        raise UserError("pool.is_masked: masks a token of a prompt")
