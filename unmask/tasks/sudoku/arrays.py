"""Puzzles from `.npy` arrays: rows of 325 integers (Shah et al. 2024), or of 162.

Rows are taken in chunks: the 1.8 million of Shah et al. are 4.7 GB as int64. Dimensions: N boards.
"""

import gzip
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmask.errors import UserError
from unmask.tasks.sudoku import board
from unmask.tasks.sudoku.puzzles import PuzzleSet, checked

_CHUNK = 20_000
_SAMPLE = 100  # rows that show the order of the quadruples
Quads = tuple[int, int, int, int]
"""Where row, column and value stand within a quadruple, and whether rows and columns count from 0 or 1."""


def read_array(path: Path, *, with_turns: bool = False) -> PuzzleSet:
    """Reads `path`; with the turns of its solver if they are wanted, and every row of 325 says them.

    Raises:
        UserError: not an array, of the wrong shape or type, or a row (named) that is no puzzle with its solution.
    """
    array = _load(path)
    if array.ndim != 2 or array.shape[1] not in (162, 325):
        raise UserError(f"{path}: an array of shape {array.shape}; needs (N, 325) or (N, 162)")
    if array.dtype.kind not in "iuf":
        raise UserError(f"{path}: an array of dtype {array.dtype}; needs integers (as floats, if you like)")
    has_quads = array.shape[1] == 325
    layout = _infer_layout(_integers(array[:_SAMPLE], path), path) if has_quads else (0, 0, 0, 0)
    parts = []
    for start in range(0, len(array), _CHUNK):
        rows = _integers(array[start : start + _CHUNK], path)
        where = partial(_name_row, path, start)
        if has_quads:
            puzzles, solutions, turns = _place(rows, layout, where)
            has_turns = with_turns and _has_strategies(rows, layout)
            parts.append(checked(puzzles, solutions, where, turns if has_turns else None))
        else:
            parts.append(checked(rows[:, :81], rows[:, 81:], where))
    return PuzzleSet.concatenate(parts)


def _load(path: Path) -> NDArray[Any]:
    """The array, from the disk as it is needed where it is not compressed."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                array = np.load(file, allow_pickle=False)
        else:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a plain .npy array: {error}") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: not a plain .npy array but an archive of several; save one of them with np.save")
    return array


def _name_row(path: Path, start: int, row: int) -> str:
    return f"{path}, row {start + row}"


def _integers(rows: NDArray[Any], path: Path) -> NDArray[np.int64]:
    if rows.dtype.kind == "f" and not (np.isfinite(rows) & (rows == np.round(rows))).all():
        raise UserError(f"{path}: an array of dtype {rows.dtype}; needs integers, as floats if you like, not fractions")
    return rows.astype(np.int64)


def _infer_layout(rows: NDArray[np.int64], path: Path) -> Quads:
    """The order of (row, column, value, strategy) and the base under which most of `rows` hold solved grids."""
    quads = rows[:, 1:].reshape(-1, 81, 4)
    for row, column, value, _ in permutations(range(4)):
        for base in (0, 1):
            cells = (quads[..., row] - base) * 9 + quads[..., column] - base
            values = np.take_along_axis(quads[..., value], cells.argsort(1), 1)
            if 2 * (_cover_board(cells) & board.is_solution(values)).sum() >= len(quads):
                return row, column, value, base
    raise UserError(f"{path}: no order of (row, col, value, strategy) makes the 81 quadruples of a row a solved grid")


def _cover_board(cells: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each row's cells are all 81: (N,)."""
    return (np.sort(cells, axis=1) == np.arange(81)).all(axis=1)


def _place(
    rows: NDArray[np.int64], layout: Quads, where: Callable[[int], str]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Puzzles, solutions and turns from `[k, 81 x quadruple]`, whose first k quadruples are the givens."""
    row, column, value, base = layout
    num_givens, quads = rows[:, 0], rows[:, 1:].reshape(-1, 81, 4)
    cells = (quads[..., row] - base) * 9 + quads[..., column] - base
    for i in np.flatnonzero((num_givens < 0) | (num_givens > 81)):
        raise UserError(f"{where(int(i))}: claims {num_givens[i]} givens; a board has 81 cells")
    for i in np.flatnonzero(~_cover_board(cells)):
        raise UserError(f"{where(int(i))}: the 81 quadruples do not name every cell once")
    turns = cells.argsort(axis=1)
    solutions = np.take_along_axis(quads[..., value], turns, axis=1)
    return np.where(turns < num_givens[:, None], solutions, 0), solutions, turns


def _has_strategies(rows: NDArray[np.int64], layout: Quads) -> bool:
    """Whether a solver has been at every row: it leaves its strategies, which are not 0, behind the givens.

    Where there are none, the quadruples may stand in any order, row-major for instance.
    """
    place = 6 - sum(layout[:3])  # what row, column and value leave of 0, 1, 2 and 3
    strategies = rows[:, 1:].reshape(-1, 81, 4)[..., place]
    is_filled = np.arange(81) >= rows[:, :1]
    return bool((is_filled & (strategies != 0)).any(axis=1).all())
