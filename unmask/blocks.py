"""Rows cut into N = L / S blocks of S positions; plain diffusion has one block per row.

Dimensions: b rows, L positions, N blocks, S positions of a block.
"""

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from unmask.errors import UserError


def check_block_size(size: int, length: int, key: str = "process.block_size") -> None:
    """Checks that blocks of `size` fill rows of `length`.

    Raises:
        UserError: they do not; names the two nearest sizes that do.
    """
    if length % size:
        divisors = [n for n in range(1, length + 1) if length % n == 0]
        nearest = sorted(sorted(divisors, key=lambda n: abs(n - size))[:2])
        raise UserError(
            f"{key}={size} does not divide rows of {length} positions; use {' or '.join(map(str, nearest))}"
        )


def count_blocks(length: int, size: int | None, key: str = "process.block_size") -> int:
    """Returns N for rows of `length`; 1 without blocks.

    Raises:
        UserError: blocks of `size` do not fill a row.
    """
    if size is None:
        return 1
    check_block_size(size, length, key)
    return length // size


def blocks_of(number: Int[Tensor, "b"], num_blocks: int) -> Int[Tensor, "b N"]:
    """Returns `number * N + n` for block n: the noise key of a block. With N = 1 it is the row's own `number`."""
    return number.unsqueeze(1) * num_blocks + torch.arange(num_blocks, device=number.device)


def in_blocks(values: Shaped[Tensor, "b L"], num_blocks: int) -> Shaped[Tensor, "b N S"]:
    """Views the values of a row block by block."""
    return values.unflatten(1, (num_blocks, -1))


def over_positions(values: Shaped[Tensor, "b *N"], length: int) -> Shaped[Tensor, "b L"]:
    """Repeats each block's value (or each row's, if there is one per row) at all of its positions."""
    per_block = values.reshape(len(values), -1, 1)
    return per_block.expand(-1, -1, length // per_block.shape[1]).reshape(len(values), length)
