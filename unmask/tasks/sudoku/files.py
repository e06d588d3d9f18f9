"""Puzzles from files. Every error names the file, and the line or row.

* `.csv`: columns `puzzle` and `solution` (or `quizzes` and `solutions`, as on Kaggle);
* `.txt`: one puzzle a line, `.` or `0` for an empty cell; the solution is computed and must be the only one;
* `.npy`: rows of 325 integers (Shah et al. 2024), `[k, 81 x (row, col, value, strategy)]` with the k givens first; the
  order within a quadruple and whether rows count from 0 or 1 are inferred. Or rows of 162: puzzle, then solution.

Each may be gzipped (`.gz`). Dimensions: N boards.
"""

import csv
import gzip
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unmask.errors import UserError
from unmask.tasks.sudoku import board
from unmask.tasks.sudoku.arrays import read_array
from unmask.tasks.sudoku.board import Boards
from unmask.tasks.sudoku.puzzles import PuzzleSet, checked
from unmask.tasks.sudoku.solver import solve

_COLUMN_NAMES = (("puzzle", "solution"), ("quizzes", "solutions"))


def load(path: Path, *, with_turns: bool = False) -> PuzzleSet:
    """Reads `path` by its suffix; with the turns of a solver if they are wanted and the file says them.

    Raises:
        UserError: an unreadable or empty file, a wrong format, or a puzzle that does not fit its solution.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in (".npy", *_READERS):
        raise UserError(f"{path}: unknown format {suffix!r}; use .csv, .txt or .npy, each optionally with .gz")
    result = read_array(path, with_turns=with_turns) if suffix == ".npy" else _READERS[suffix](_read(path), path)
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


def _read_text(content: str, path: Path) -> PuzzleSet:
    puzzles, numbers = parse_lines(enumerate(content.splitlines(), start=1), str(path))
    solutions = solve(puzzles, limit=2)
    for i in np.flatnonzero(~solutions.is_certain):
        raise UserError(f"{path}, line {numbers[i]}: no end to the search for the puzzle's solutions; leave it out")
    for i in np.flatnonzero(solutions.count != 1):
        what = "has no solution" if solutions.count[i] == 0 else "has several solutions; exactly one is needed"
        raise UserError(f"{path}, line {numbers[i]}: the puzzle {what}")
    return PuzzleSet(puzzles, solutions.first)


def _read_csv(content: str, path: Path) -> PuzzleSet:
    reader = csv.DictReader(content.splitlines())
    try:
        header = reader.fieldnames or []
        columns = next((pair for pair in _COLUMN_NAMES if set(pair) <= set(header)), None)
        if columns is None:
            raise UserError(f"{path}, line 1: needs the columns puzzle,solution; found {','.join(header)}")
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV: {error}") from error

    def where(i: int) -> str:
        return f"{path}, line {rows[i][0]}"

    def parse_column(name: str) -> Boards:
        return _parse_boards([row[name] or "" for _, row in rows], lambda i: f"{where(i)}, column {name}")

    return checked(parse_column(columns[0]), parse_column(columns[1]), where)


def _read(path: Path) -> str:
    """The text of `path`, decompressed if it ends in `.gz`."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text, at byte {error.start}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not text:
        raise UserError(f"{path}: the file is empty")
    return text


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


def _has_contradiction(puzzles: Boards) -> NDArray[np.bool_]:
    in_units = np.sort(puzzles[:, board.UNITS], axis=-1)
    return ((in_units[..., 1:] == in_units[..., :-1]) & (in_units[..., 1:] > 0)).any(axis=(1, 2))


_READERS = {".csv": _read_csv, ".txt": _read_text}
