"""The symmetries of Sudoku, keyed by an example's number: the n-th example of a stream always looks the same.

Digits are relabelled; rows within bands, bands, columns within stacks and stacks are permuted; half of the boards are
transposed. Dimensions: N boards.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from unmask import noise
from unmask.noise import Purpose


@dataclass(frozen=True)
class Symmetry:
    """One for each of N boards."""

    cell: Int[Tensor, "N 81"]
    """Which cell comes to stand in each."""
    relabel: Int[Tensor, "N 10"]
    """What becomes of each digit; 0, an empty cell, stays 0."""

    @classmethod
    def draw(cls, number: Int[Tensor, "N"], seed: int) -> "Symmetry":
        u = noise.uniform(seed, Purpose.AUGMENT, number.unsqueeze(1), torch.arange(34))
        digits, lines, is_transposed = u[:, :9], u[:, 9:33], u[:, 33:] < 0.5
        relabel = torch.cat([torch.zeros_like(number).unsqueeze(1), digits.argsort(dim=1) + 1], dim=1)
        row, column = _line_order(lines[:, :12]), _line_order(lines[:, 12:])
        cell = row.unsqueeze(2) * 9 + column.unsqueeze(1)
        return cls(torch.where(is_transposed.unsqueeze(2), cell.mT, cell).flatten(1), relabel)

    def move(self, values: Int[Tensor, "N 81"]) -> Int[Tensor, "N 81"]:
        """What belongs to cells and is no digit goes along with them."""
        return values.gather(1, self.cell)

    def apply(self, boards: Int[Tensor, "N 81"]) -> Int[Tensor, "N 81"]:
        """Boards with their cells moved and their digits relabelled."""
        return self.relabel.gather(1, self.move(boards))


def augment(
    puzzles: Int[Tensor, "N 81"], solutions: Int[Tensor, "N 81"], number: Int[Tensor, "N"], seed: int
) -> tuple[Int[Tensor, "N 81"], Int[Tensor, "N 81"]]:
    """One random symmetry per board, the same for a puzzle and its solution."""
    symmetry = Symmetry.draw(number, seed)
    return symmetry.apply(puzzles), symmetry.apply(solutions)


def _line_order(u: Tensor) -> Int[Tensor, "N 9"]:
    """An order of nine lines that keeps bands together, from twelve uniforms: three for the bands, nine within them."""
    band = u[:, :3].argsort(dim=1)
    within = u[:, 3:].unflatten(1, (3, 3)).argsort(dim=2)
    return (band.unsqueeze(2) * 3 + within).flatten(1)
