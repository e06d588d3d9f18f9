"""Boards, their symmetries, and puzzles with solutions.

A board has 81 cells in row-major order, digits 1 to 9, 0 for an empty cell. Symmetries are keyed by an example's
number: the n-th example of a stream always looks the same. Dimensions: N boards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from unmask import noise
from unmask.errors import UserError
from unmask.noise import Purpose

Boards = NDArray[np.uint8]  # (N, 81)

_CELLS = np.arange(81).reshape(9, 9)
_BOXES = _CELLS.reshape(3, 3, 3, 3).transpose(0, 2, 1, 3).reshape(9, 9)
UNITS = np.concatenate([_CELLS, _CELLS.T, _BOXES])  # (27, 9): rows, then columns, then boxes
UNIT_KINDS = ("row", "column", "box")


def complete_units(boards: NDArray[Any]) -> NDArray[np.bool_]:
    """True where a unit of `boards` (N, 81) holds every digit once: (N, 27)."""
    in_order = np.sort(boards[:, UNITS], axis=-1) == np.arange(1, 10)
    return np.logical_and.reduce(in_order, axis=-1)


def is_solution(boards: NDArray[Any]) -> NDArray[np.bool_]:
    """True where all 27 units hold every digit once: (N,)."""
    return np.logical_and.reduce(complete_units(boards), axis=-1)


def keeps_givens(puzzles: NDArray[Any], answers: NDArray[Any]) -> NDArray[np.bool_]:
    """True where `answers` (N, 81) keep *every* given of `puzzles` (N, 81): (N,)."""
    return ((puzzles == 0) | (puzzles == answers)).all(axis=-1)


def parse(text: str, where: str) -> NDArray[np.uint8]:
    """Parses a board (81,) from 81 symbols, `.` or `0` for an empty cell.

    Raises:
        UserError: another length or symbol; the message begins with `where`.
    """
    text = text.strip()
    if len(text) != 81:
        raise UserError(f"{where}: a puzzle has 81 cells, this has {len(text)}: {_shorten(text)!r}")
    if bad := set(text) - set("0123456789."):
        column = next(i for i, symbol in enumerate(text) if symbol in bad)
        raise UserError(f"{where}: cell {column + 1} is {text[column]!r}; use the digits 1 to 9, and . or 0 for empty")
    return np.array([0 if symbol == "." else int(symbol) for symbol in text], dtype=np.uint8)


def find_contradiction(puzzle: NDArray[np.uint8]) -> str | None:
    """Describes a digit that stands twice in a unit of `puzzle` (81,); None if there is none."""
    for number, unit in enumerate(UNITS):
        digits = puzzle[unit][puzzle[unit] > 0]
        values, counts = np.unique(digits, return_counts=True)
        if (counts > 1).any():
            kind = UNIT_KINDS[number // 9]
            return f"{values[counts > 1][0]} stands twice in {kind} {number % 9 + 1}"
    return None


def to_text(board: NDArray[Any]) -> str:
    """Formats a board (81,) as 81 symbols, 0 for an empty cell."""
    return "".join(str(int(digit)) for digit in board)


def _shorten(text: str) -> str:
    return text if len(text) <= 90 else text[:87] + "..."


@dataclass(frozen=True)
class Symmetry:
    """Symmetries of N boards.

    Digits are relabelled; rows within bands, bands, columns within stacks and stacks are permuted; half of the boards
    are transposed.
    """

    cell: Int[Tensor, "N 81"]
    """The old place of the cell that comes to stand in each place."""
    relabel: Int[Tensor, "N 10"]
    """The new digit for each digit; 0, an empty cell, stays 0."""

    @classmethod
    def draw(cls, number: Int[Tensor, "N"], seed: int) -> "Symmetry":
        """Draws the symmetries of the examples `number`."""
        u = noise.uniform(seed, Purpose.AUGMENT, number.unsqueeze(1), torch.arange(34))
        digits, lines, is_transposed = u[:, :9], u[:, 9:33], u[:, 33:] < 0.5
        relabel = torch.cat([torch.zeros_like(number).unsqueeze(1), digits.argsort(dim=1) + 1], dim=1)
        row, column = _line_order(lines[:, :12]), _line_order(lines[:, 12:])
        cell = row.unsqueeze(2) * 9 + column.unsqueeze(1)
        return cls(torch.where(is_transposed.unsqueeze(2), cell.mT, cell).flatten(1), relabel)

    def move(self, values: Int[Tensor, "N 81"]) -> Int[Tensor, "N 81"]:
        """Moves `values`, which belong to cells and are no digits, along with the cells."""
        return values.gather(1, self.cell)

    def apply(self, boards: Int[Tensor, "N 81"]) -> Int[Tensor, "N 81"]:
        """Moves the cells of `boards`, and relabels their digits."""
        return self.relabel.gather(1, self.move(boards))


def augment(
    puzzles: Int[Tensor, "N 81"], solutions: Int[Tensor, "N 81"], number: Int[Tensor, "N"], seed: int
) -> tuple[Int[Tensor, "N 81"], Int[Tensor, "N 81"]]:
    """Applies a random symmetry to each board, the same to a puzzle and its solution."""
    symmetry = Symmetry.draw(number, seed)
    return symmetry.apply(puzzles), symmetry.apply(solutions)


def _line_order(u: Tensor) -> Int[Tensor, "N 9"]:
    """Draws an order of nine lines that keeps bands together; `u` is three uniforms for the bands, nine within them."""
    band = u[:, :3].argsort(dim=1)
    within = u[:, 3:].unflatten(1, (3, 3)).argsort(dim=2)
    return (band.unsqueeze(2) * 3 + within).flatten(1)


@dataclass(frozen=True)
class PuzzleSet:
    """Puzzles (N, 81), 0 for an empty cell, and their solutions (N, 81)."""

    puzzles: Boards
    solutions: Boards
    turns: Boards | None = None
    """Order in which a solver filled the empty cells (N, 81): smaller is sooner. None if unknown."""

    def __len__(self) -> int:
        return len(self.puzzles)

    def __getitem__(self, index: NDArray[Any] | slice) -> "PuzzleSet":
        turns = None if self.turns is None else self.turns[index]
        return PuzzleSet(self.puzzles[index], self.solutions[index], turns)

    @staticmethod
    def concatenate(parts: "list[PuzzleSet]") -> "PuzzleSet":
        """Joins `parts`; the turns are known if every part knows its own."""
        empty = np.zeros((0, 81), dtype=np.uint8)
        turns = [part.turns for part in parts if part.turns is not None]
        return PuzzleSet(
            np.concatenate([empty, *(part.puzzles for part in parts)]),
            np.concatenate([empty, *(part.solutions for part in parts)]),
            np.concatenate(turns) if parts and len(turns) == len(parts) else None,
        )


def check_puzzles(
    puzzles: NDArray[Any], solutions: NDArray[Any], where: Callable[[int], str], turns: NDArray[Any] | None = None
) -> PuzzleSet:
    """Makes a set of puzzles and solutions, which must fit each other.

    Raises:
        UserError: some do not; the message begins with `where(number)` of the first.
    """
    for i in np.flatnonzero(~is_solution(solutions)):
        raise UserError(f"{where(int(i))}: the solution breaks a row, column or box")
    for i in np.flatnonzero(~keeps_givens(puzzles, solutions)):
        raise UserError(f"{where(int(i))}: the solution changes a given of the puzzle")
    for i in np.flatnonzero((puzzles > 0).all(axis=1)):
        raise UserError(f"{where(int(i))}: the puzzle has no empty cell")
    turns = None if turns is None else turns.astype(np.uint8)
    return PuzzleSet(puzzles.astype(np.uint8), solutions.astype(np.uint8), turns)
