"""Rows as blocks: N = L / S of S positions each, the one view that masking, evaluation and report share.

Plain diffusion has one block a row. Dimensions: b rows, L positions, N blocks, S positions of a block.
"""

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from unmask.errors import UserError


def check_block_size(size: int, length: int, key: str = "process.block_size") -> None:
    """Whether blocks of `size` fill rows of `length`.

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
    """N of rows of `length`; 1 without blocks.

    Raises:
        UserError: blocks of `size` do not fill a row.
    """
    if size is None:
        return 1
    check_block_size(size, length, key)
    return length // size


def blocks_of(number: Int[Tensor, "b"], num_blocks: int) -> Int[Tensor, "b N"]:
    """`number * N + n` for block n: what keys the noise of a block where plain diffusion has a `number` of the row."""
    return number.unsqueeze(1) * num_blocks + torch.arange(num_blocks, device=number.device)


def in_blocks(values: Shaped[Tensor, "b L"], num_blocks: int) -> Shaped[Tensor, "b N S"]:
    """The same values, seen block by block."""
    return values.unflatten(1, (num_blocks, -1))


def over_positions(values: Shaped[Tensor, "b *N"], length: int) -> Shaped[Tensor, "b L"]:
    """Each block's value at all of its positions; a row's, where there is one a row."""
    per_block = values.reshape(len(values), -1, 1)
    return per_block.expand(-1, -1, length // per_block.shape[1]).reshape(len(values), length)
