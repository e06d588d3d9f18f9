"""Puzzles that several tests share, and files of them."""

from pathlib import Path

import numpy as np

from unmask.tasks.sudoku import board

EASY = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
EASY_SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
# Inkala's "hardest": needs much search.
HARD = "800000000003600000070090200050007000000045700000100030001000068008500010090000400"
# Two rectangles of the easy solution's digits emptied until several solutions remain.
EMPTY = "0" * 81
CONTRADICTORY = "55" + "0" * 79
NO_SOLUTION = "123456780000000009" + "0" * 63  # the last cell of row 1 has no digit left


def boards(*texts: str) -> np.ndarray:
    return np.stack([board.parse(text, "test") for text in texts])


def shah_rows(puzzles: np.ndarray, solutions: np.ndarray, order: str = "rcvs", base: int = 0) -> np.ndarray:
    """Writes rows [k, 81 x quadruple] by hand, givens first."""
    rows = []
    for puzzle, solution in zip(puzzles, solutions, strict=True):
        given, open_ = np.flatnonzero(puzzle), np.flatnonzero(puzzle == 0)
        quads = []
        for cell in [*given, *np.random.default_rng(0).permutation(open_)]:
            fields = {"r": cell // 9 + base, "c": cell % 9 + base, "v": solution[cell], "s": 0 if puzzle[cell] else 2}
            quads += [fields[letter] for letter in order]
        rows.append([len(given), *quads])
    return np.array(rows)


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path
