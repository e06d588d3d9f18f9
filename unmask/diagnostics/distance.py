"""How far a masked token is from what the model sees.

Dimensions: B rows, L positions.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

NOWHERE = 2**31 - 1
"""The distance where nothing is visible on that side."""


def to_visible(
    is_masked: Bool[Tensor, "B L"], block_size: int | None = None
) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"]]:
    """Positions to the nearest visible one on the left and on the right: 1 is the neighbour, 0 a visible one itself.

    In blocks, a position sees all that precedes its block, whatever is masked there, and nothing that follows it.
    """
    length = is_masked.shape[1]
    position = torch.arange(length, device=is_masked.device)
    start = position // (block_size or length) * (block_size or length)
    end = start + (block_size or length)
    left = torch.where(is_masked, -1, position).cummax(dim=1).values.maximum(start - 1)
    right = torch.where(is_masked, length, position).flip(1).cummin(dim=1).values.flip(1)
    return (
        torch.where(left < 0, NOWHERE, position - left),
        torch.where(right >= end, NOWHERE, right - position),
    )
