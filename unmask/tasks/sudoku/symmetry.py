"""The symmetries of Sudoku, keyed by an example's number: the n-th example of a stream always looks the same.

Digits are relabelled; rows within bands, bands, columns within stacks and stacks are permuted; half of the boards are
transposed. Dimensions: N boards.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from unmask import noise
from unmask.noise import Purpose


def augment(
    puzzles: Int[Tensor, "N 81"], solutions: Int[Tensor, "N 81"], number: Int[Tensor, "N"], seed: int
) -> tuple[Int[Tensor, "N 81"], Int[Tensor, "N 81"]]:
    """One random symmetry per board, the same for a puzzle and its solution."""
    u = noise.uniform(seed, Purpose.AUGMENT, number.unsqueeze(1), torch.arange(34))
    digits, lines, is_transposed = u[:, :9], u[:, 9:33], u[:, 33:] < 0.5
    relabel = torch.cat([torch.zeros_like(number).unsqueeze(1), digits.argsort(dim=1) + 1], dim=1)  # 0 stays empty
    row, column = _line_order(lines[:, :12]), _line_order(lines[:, 12:])
    cell = row.unsqueeze(2) * 9 + column.unsqueeze(1)
    cell = torch.where(is_transposed.unsqueeze(2), cell.mT, cell).flatten(1)
    return relabel.gather(1, puzzles.gather(1, cell)), relabel.gather(1, solutions.gather(1, cell))


def _line_order(u: Tensor) -> Int[Tensor, "N 9"]:
    """An order of nine lines that keeps bands together, from twelve uniforms: three for the bands, nine within them."""
    band = u[:, :3].argsort(dim=1)
    within = u[:, 3:].unflatten(1, (3, 3)).argsort(dim=2)
    return (band.unsqueeze(2) * 3 + within).flatten(1)
