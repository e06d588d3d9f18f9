"""Reads puzzles from files. Every error names the file, and the line or row.

* `.csv`: columns `puzzle` and `solution` (or `quizzes` and `solutions`, as on Kaggle; or `question` and `answer`, as in
  sudoku-extreme; or those that `data.columns` names);
* `.txt`: one puzzle a line, `.` or `0` for an empty cell; the solution is computed and must be the only one;
* `.npy`: rows of 325 integers (Shah et al. 2024), `[k, 81 x (row, col, value, strategy)]` with the k givens first; the
  order within a quadruple and whether rows count from 0 or 1 are inferred. Or rows of 162: puzzle, then solution.
  Rows are taken in chunks: the 1.8 million of Shah et al. are 4.7 GB as int64.

Each may be gzipped (`.gz`). Dimensions: N boards.
"""

import csv
import io
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmask import machine
from unmask.data.source_files import open_data, read_data
from unmask.errors import UserError
from unmask.paths import existing_file
from unmask.tasks.sudoku import board
from unmask.tasks.sudoku.board import Boards, PuzzleSet, check_puzzles
from unmask.tasks.sudoku.solver import solve

_CHUNK = 20_000
_SAMPLE = 100  # rows that show the order of the quadruples
Quads = tuple[int, int, int, int]
"""The places of row, column and value within a quadruple, and 0 or 1, from which rows and columns count."""
_COLUMN_NAMES = (("puzzle", "solution"), ("quizzes", "solutions"), ("question", "answer"))


def load(
    path: Path, *, with_turns: bool = False, columns: Sequence[str] | None = None, is_other: bool = False
) -> PuzzleSet:
    """Reads `path` by its suffix.

    Args:
        path: the file.
        with_turns: with the turns of a solver, if the file holds them.
        columns: the names of a CSV's columns of puzzles and solutions (default: those of well-known sets).
        is_other: it is another file than `columns` was set for, and may have those of well-known sets.

    Raises:
        UserError: the file cannot be read, is empty or of a wrong format, or a puzzle does not fit its solution.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in (".npy", ".csv", ".txt"):
        raise UserError(f"{path}: unknown format {suffix!r}; use .csv, .txt or .npy, each optionally with .gz")
    if columns is not None and suffix != ".csv" and not is_other:
        raise UserError(f"data.columns={list(columns)}: {path} has none, as only a .csv has; leave it out")
    if suffix == ".npy":
        result = read_array(path, with_turns=with_turns)
    elif suffix == ".csv":
        named = [] if columns is None else [tuple(columns)]
        result = _read_csv(_read(path), path, [*named, *(_COLUMN_NAMES if is_other or not named else ())])
    else:
        result = _read_text(_read(path), path)
    if not len(result):
        raise UserError(f"{path}: holds no puzzle")
    return result


def parse_lines(lines: Iterable[tuple[int, str]], source: str) -> tuple[Boards, NDArray[np.int64]]:
    """Parses puzzles (N, 81) from numbered lines, empty ones skipped; returns the line number of each too.

    Raises:
        UserError: a line has a wrong length or symbol, or a digit stands twice in a unit.
    """
    rows = [(number, line.strip()) for number, line in lines if line.strip()]
    numbers = np.array([number for number, _ in rows], dtype=np.int64)
    puzzles = _parse_boards([text for _, text in rows], lambda i: f"{source}, line {rows[i][0]}")
    for i in np.flatnonzero(_has_contradiction(puzzles)):
        raise UserError(f"{source}, line {numbers[i]}: the givens contradict: {board.find_contradiction(puzzles[i])}")
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


def _read_csv(content: str, path: Path, pairs: Sequence[tuple[str, ...]]) -> PuzzleSet:
    reader = csv.DictReader(content.splitlines())
    try:
        header = list(reader.fieldnames or [])
        columns = next((pair for pair in pairs if set(pair) <= set(header)), None)
        if columns is None:
            raise UserError(
                f"{path}, line 1: needs the columns {','.join(pairs[0])}; found {','.join(header)[:200]} (name those "
                "of puzzles and solutions: data.columns=[PUZZLE,SOLUTION])"
            )
        for name in columns:
            if header.count(name) > 1:
                raise UserError(f"{path}, line 1: has {header.count(name)} columns {name}; rename all but one")
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV: {error}") from error

    def where(i: int) -> str:
        return f"{path}, line {rows[i][0]}"

    def parse_column(name: str) -> Boards:
        return _parse_boards([row[name] or "" for _, row in rows], lambda i: f"{where(i)}, column {name}")

    return check_puzzles(parse_column(columns[0]), parse_column(columns[1]), where)


def _read(path: Path) -> str:
    """Reads the text of `path`, decompressed if it ends in `.gz`."""
    try:
        text = read_data(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text, at byte {error.start}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not text:
        raise UserError(f"{path}: the file is empty")
    return text


def _parse_boards(texts: list[str], where: Callable[[int], str]) -> Boards:
    """Parses boards (N, 81), all at once where every text is well-formed; else raises the first bad one's error."""
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


def read_array(path: Path, *, with_turns: bool = False) -> PuzzleSet:
    """Reads an array; with the turns of its solver if `with_turns`, and if every row of 325 holds them.

    Raises:
        UserError: it is no array, of the wrong shape or type, or a row (named) is no puzzle with its solution.
    """
    array = _load_array(path)
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
            parts.append(check_puzzles(puzzles, solutions, where, turns if has_turns else None))
        else:
            parts.append(check_puzzles(rows[:, :81], rows[:, 81:], where))
    return PuzzleSet.concatenate(parts)


def _load_array(path: Path) -> NDArray[Any]:
    """Loads the array; one that is not compressed is mapped into memory."""
    path = existing_file(path)
    try:
        if path.suffix == ".gz":
            with open_data(path) as file:
                _check_size(file, path)
            with open_data(path) as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
        else:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except UserError:
        raise
    except (OSError, EOFError, ValueError, OverflowError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a plain .npy array: {error}") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: not a plain .npy array but an archive of several; save one of them with np.save")
    return array


def _check_size(file: io.BufferedReader, path: Path) -> None:
    """Checks, before anything is allocated, that an array whose head stands in `file` fits in memory."""
    major, _ = np.lib.format.read_magic(file)
    read_head = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_head(file)
    machine.require_memory(math.prod(shape) * dtype.itemsize, f"{path}: an array of shape {shape}", "take fewer rows")


def _name_row(path: Path, start: int, row: int) -> str:
    return f"{path}, row {start + row}"


def _integers(rows: NDArray[Any], path: Path) -> NDArray[np.int64]:
    if rows.dtype.kind == "f" and not (np.isfinite(rows) & (rows == np.round(rows))).all():
        raise UserError(f"{path}: an array of dtype {rows.dtype}; needs integers, as floats if you like, not fractions")
    return rows.astype(np.int64)


def _infer_layout(rows: NDArray[np.int64], path: Path) -> Quads:
    """Finds the order of (row, column, value, strategy) and the base under which most `rows` hold solved grids."""
    quads = rows[:, 1:].reshape(-1, 81, 4)
    for row, column, value, _ in permutations(range(4)):
        for base in (0, 1):
            cells = (quads[..., row] - base) * 9 + quads[..., column] - base
            values = np.take_along_axis(quads[..., value], cells.argsort(1), 1)
            if 2 * (_cover_board(cells) & board.is_solution(values)).sum() >= len(quads):
                return row, column, value, base
    raise UserError(f"{path}: no order of (row, col, value, strategy) makes the 81 quadruples of a row a solved grid")


def _cover_board(cells: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True where the cells of a row are all 81: (N,)."""
    return (np.sort(cells, axis=1) == np.arange(81)).all(axis=1)


def _place(
    rows: NDArray[np.int64], layout: Quads, where: Callable[[int], str]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Makes puzzles, solutions and turns of `[k, 81 x quadruple]`, whose first k quadruples are the givens."""
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
    """True if a solver filled every row: its strategies, which are not 0, follow the givens.

    Where there are none, the quadruples may stand in any order, row-major for instance.
    """
    place = 6 - sum(layout[:3])  # what row, column and value leave of 0, 1, 2 and 3
    strategies = rows[:, 1:].reshape(-1, 81, 4)[..., place]
    is_filled = np.arange(81) >= rows[:, :1]
    return bool((is_filled & (strategies != 0)).any(axis=1).all())
