"""Puzzles from files. Every error names the file, and the line or row.

* `.csv`: columns `puzzle` and `solution` (or `quizzes` and `solutions`, as on Kaggle);
* `.txt`: one puzzle a line, `.` or `0` for an empty cell; the solution is computed and must be the only one;
* `.npy`: rows of 325 integers (Shah et al. 2024), `[k, 81 x (row, col, value, strategy)]` with the k givens first; the
  order within a quadruple and whether rows count from 0 or 1 are inferred. Or rows of 162: puzzle, then solution.

Each may be gzipped (`.gz`). Dimensions: N boards.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmask.errors import UserError
from unmask.tasks.sudoku import board
from unmask.tasks.sudoku.board import Boards
from unmask.tasks.sudoku.solver import solve

_COLUMN_NAMES = (("puzzle", "solution"), ("quizzes", "solutions"))


@dataclass(frozen=True)
class PuzzleSet:
    """Puzzles (N, 81), 0 for an empty cell, and their solutions (N, 81)."""

    puzzles: Boards
    solutions: Boards

    def __len__(self) -> int:
        return len(self.puzzles)

    def __getitem__(self, index: NDArray[Any] | slice) -> "PuzzleSet":
        return PuzzleSet(self.puzzles[index], self.solutions[index])


def load(path: Path) -> PuzzleSet:
    """Reads `path` by its suffix.

    Raises:
        UserError: an unreadable or empty file, a wrong format, or a puzzle that does not fit its solution.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in _READERS:
        raise UserError(f"{path}: unknown format {suffix!r}; use {', '.join(_READERS)}, each optionally with .gz")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not content:
        raise UserError(f"{path}: the file is empty")
    result = _READERS[suffix](content, path)
    if not len(result):
        raise UserError(f"{path}: holds no puzzle")
    return result


def parse_lines(lines: Iterable[tuple[int, str]], source: str) -> tuple[Boards, NDArray[np.int64]]:
    """Puzzles (N, 81) from numbered lines, empty ones skipped, and the line number of each.

    Raises:
        UserError: a wrong length or symbol, or a digit that stands twice in a unit.
    """
    rows = [(number, line.strip()) for number, line in lines if line.strip()]
    numbers = np.array([number for number, _ in rows], dtype=np.int64)
    puzzles = _parse_boards([text for _, text in rows], lambda i: f"{source}, line {rows[i][0]}")
    for i in np.flatnonzero(_has_contradiction(puzzles)):
        raise UserError(f"{source}, line {numbers[i]}: the givens contradict: {board.contradiction(puzzles[i])}")
    return puzzles, numbers


def _read_text(content: bytes, path: Path) -> PuzzleSet:
    puzzles, numbers = parse_lines(enumerate(_decode(content, path).splitlines(), start=1), str(path))
    solutions = solve(puzzles, limit=2)
    for i in np.flatnonzero(solutions.count != 1):
        what = "has no solution" if solutions.count[i] == 0 else "has several solutions; exactly one is needed"
        raise UserError(f"{path}, line {numbers[i]}: the puzzle {what}")
    return PuzzleSet(puzzles, solutions.first)


def _read_csv(content: bytes, path: Path) -> PuzzleSet:
    reader = csv.DictReader(io.StringIO(_decode(content, path)))
    header = reader.fieldnames or []
    columns = next((pair for pair in _COLUMN_NAMES if set(pair) <= set(header)), None)
    if columns is None:
        raise UserError(f"{path}, line 1: needs the columns puzzle,solution; found {','.join(header)}")
    rows = [(reader.line_num, row) for row in reader]

    def where(i: int) -> str:
        return f"{path}, line {rows[i][0]}"

    def parse_column(name: str) -> Boards:
        return _parse_boards([row[name] or "" for _, row in rows], lambda i: f"{where(i)}, column {name}")

    return _checked(parse_column(columns[0]), parse_column(columns[1]), where)


def _read_array(content: bytes, path: Path) -> PuzzleSet:
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{path}: not a plain .npy array: {error}") from error
    if array.ndim != 2 or array.shape[1] not in (162, 325):
        raise UserError(f"{path}: an array of shape {array.shape}; needs (N, 325) or (N, 162)")
    if array.dtype.kind not in "iuf" or (array.dtype.kind == "f" and not (array == np.round(array)).all()):
        raise UserError(f"{path}: an array of dtype {array.dtype}; needs integers (as floats, if you like)")
    array = array.astype(np.int64)
    puzzles, solutions = (array[:, :81], array[:, 81:]) if array.shape[1] == 162 else _from_quads(array, path)
    return _checked(puzzles, solutions, lambda i: f"{path}, row {i}")


def _from_quads(rows: NDArray[np.int64], path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Puzzles and solutions from `[k, 81 x quadruple]`; the first layout under which the first rows are valid grids."""
    num_givens, quads = rows[:, 0], rows[:, 1:].reshape(-1, 81, 4)
    for i in np.flatnonzero((num_givens < 0) | (num_givens > 81)):
        raise UserError(f"{path}, row {i}: claims {num_givens[i]} givens; a board has 81 cells")
    for row, column, value, _ in permutations(range(4)):
        for base in (0, 1):
            cells = (quads[..., row] - base) * 9 + quads[..., column] - base
            if _are_grids(cells[:100], quads[:100, :, value]):
                return _place(cells, quads[..., value], num_givens, path)
    raise UserError(f"{path}: no order of (row, col, value, strategy) makes the 81 quadruples of a row a solved grid")


def _are_grids(cells: NDArray[np.int64], values: NDArray[np.int64]) -> bool:
    return bool(_cover_board(cells).all() and board.is_solution(np.take_along_axis(values, cells.argsort(1), 1)).all())


def _cover_board(cells: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each row's cells are all 81: (N,)."""
    return (np.sort(cells, axis=1) == np.arange(81)).all(axis=1)


def _place(
    cells: NDArray[np.int64], values: NDArray[np.int64], num_givens: NDArray[np.int64], path: Path
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    for i in np.flatnonzero(~_cover_board(cells)):
        raise UserError(f"{path}, row {i}: the 81 quadruples do not name every cell once")
    is_given = np.arange(81) < num_givens[:, None]
    order = cells.argsort(axis=1)
    solutions = np.take_along_axis(values, order, axis=1)
    return np.where(np.take_along_axis(is_given, order, axis=1), solutions, 0), solutions


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text, at byte {error.start}") from error


def _parse_boards(texts: list[str], where: Callable[[int], str]) -> Boards:
    """Boards (N, 81); all at once where every text is well-formed, else the first bad one's error."""
    if any(len(text.strip()) != 81 for text in texts):
        return np.array([board.parse(text, where(i)) for i, text in enumerate(texts)])
    symbols = np.frombuffer(
        "".join(text.strip() for text in texts).replace(".", "0").encode("latin-1", "replace"), np.uint8
    )
    digits = symbols.reshape(-1, 81) - ord("0")
    for i in np.flatnonzero((digits > 9).any(axis=1)):
        board.parse(texts[i], where(int(i)))  # raises
    return digits


def _checked(puzzles: NDArray[Any], solutions: NDArray[Any], where: Callable[[int], str]) -> PuzzleSet:
    for i in np.flatnonzero(~board.is_solution(solutions)):
        raise UserError(f"{where(int(i))}: the solution breaks a row, column or box")
    for i in np.flatnonzero(~board.keeps_givens(puzzles, solutions)):
        raise UserError(f"{where(int(i))}: the solution changes a given of the puzzle")
    for i in np.flatnonzero((puzzles > 0).all(axis=1)):
        raise UserError(f"{where(int(i))}: the puzzle has no empty cell")
    return PuzzleSet(puzzles.astype(np.uint8), solutions.astype(np.uint8))


def _has_contradiction(puzzles: Boards) -> NDArray[np.bool_]:
    in_units = np.sort(puzzles[:, board.UNITS], axis=-1)
    return ((in_units[..., 1:] == in_units[..., :-1]) & (in_units[..., 1:] > 0)).any(axis=(1, 2))


_READERS = {".csv": _read_csv, ".txt": _read_text, ".npy": _read_array}
