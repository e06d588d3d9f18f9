"""Puzzles with their solutions. Dimensions: N boards."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmask.errors import UserError
from unmask.tasks.sudoku import board
from unmask.tasks.sudoku.board import Boards


@dataclass(frozen=True)
class PuzzleSet:
    """Puzzles (N, 81), 0 for an empty cell, and their solutions (N, 81)."""

    puzzles: Boards
    solutions: Boards
    turns: Boards | None = None
    """When a solver filled each cell (N, 81): among the empty cells of a puzzle, smaller is sooner. None: not known."""

    def __len__(self) -> int:
        return len(self.puzzles)

    def __getitem__(self, index: NDArray[Any] | slice) -> "PuzzleSet":
        turns = None if self.turns is None else self.turns[index]
        return PuzzleSet(self.puzzles[index], self.solutions[index], turns)

    @staticmethod
    def concatenate(parts: "list[PuzzleSet]") -> "PuzzleSet":
        """All of `parts`; the turns are known if every part knows its own."""
        empty = np.zeros((0, 81), dtype=np.uint8)
        turns = [part.turns for part in parts if part.turns is not None]
        return PuzzleSet(
            np.concatenate([empty, *(part.puzzles for part in parts)]),
            np.concatenate([empty, *(part.solutions for part in parts)]),
            np.concatenate(turns) if parts and len(turns) == len(parts) else None,
        )


def checked(
    puzzles: NDArray[Any], solutions: NDArray[Any], where: Callable[[int], str], turns: NDArray[Any] | None = None
) -> PuzzleSet:
    """Puzzles and solutions that fit each other.

    Raises:
        UserError: the first that do not, found at `where(its number)`.
    """
    for i in np.flatnonzero(~board.is_solution(solutions)):
        raise UserError(f"{where(int(i))}: the solution breaks a row, column or box")
    for i in np.flatnonzero(~board.keeps_givens(puzzles, solutions)):
        raise UserError(f"{where(int(i))}: the solution changes a given of the puzzle")
    for i in np.flatnonzero((puzzles > 0).all(axis=1)):
        raise UserError(f"{where(int(i))}: the puzzle has no empty cell")
    turns = None if turns is None else turns.astype(np.uint8)
    return PuzzleSet(puzzles.astype(np.uint8), solutions.astype(np.uint8), turns)
