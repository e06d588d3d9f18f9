"""Boards: 81 cells in row-major order, digits 1 to 9, 0 for an empty cell. Dimensions: N boards."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmask.errors import UserError

Boards = NDArray[np.uint8]  # (N, 81)

_CELLS = np.arange(81).reshape(9, 9)
_BOXES = _CELLS.reshape(3, 3, 3, 3).transpose(0, 2, 1, 3).reshape(9, 9)
UNITS = np.concatenate([_CELLS, _CELLS.T, _BOXES])  # (27, 9): rows, then columns, then boxes
UNIT_KINDS = ("row", "column", "box")


def complete_units(boards: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each of the 27 units of `boards` (N, 81) holds every digit once: (N, 27)."""
    in_order = np.sort(boards[:, UNITS], axis=-1) == np.arange(1, 10)
    return np.logical_and.reduce(in_order, axis=-1)


def is_solution(boards: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether all 27 units hold: (N,)."""
    return np.logical_and.reduce(complete_units(boards), axis=-1)


def keeps_givens(puzzles: NDArray[Any], answers: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether *every* given of `puzzles` (N, 81) stands in `answers` (N, 81): (N,)."""
    return ((puzzles == 0) | (puzzles == answers)).all(axis=-1)


def parse(text: str, where: str) -> NDArray[np.uint8]:
    """A board (81,) from 81 symbols, `.` or `0` for an empty cell.

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


def contradiction(puzzle: NDArray[np.uint8]) -> str | None:
    """Which digit stands twice in which unit of `puzzle` (81,), or None."""
    for number, unit in enumerate(UNITS):
        digits = puzzle[unit][puzzle[unit] > 0]
        values, counts = np.unique(digits, return_counts=True)
        if (counts > 1).any():
            kind = UNIT_KINDS[number // 9]
            return f"{values[counts > 1][0]} stands twice in {kind} {number % 9 + 1}"
    return None


def to_text(board: NDArray[Any]) -> str:
    """81 symbols, 0 for an empty cell."""
    return "".join(str(int(digit)) for digit in board)


def _shorten(text: str) -> str:
    return text if len(text) <= 90 else text[:87] + "..."
