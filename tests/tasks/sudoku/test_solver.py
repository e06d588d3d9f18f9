import csv
import gzip
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.sudoku import CONTRADICTORY, EASY, EASY_SOLUTION, EMPTY, HARD, NO_SOLUTION, boards
from unmask.tasks.sudoku import board
from unmask.tasks.sudoku.board import UNITS, is_solution, keeps_givens
from unmask.tasks.sudoku.generator import random_grids
from unmask.tasks.sudoku.solver import is_singles_solvable, propagate, solve, to_boards, to_candidates


def backtrack(cells: list[int], limit: int) -> int:
    """Number of solutions up to `limit`, the slow and plain way."""
    try:
        cell = cells.index(0)
    except ValueError:
        return 1
    peers = {other for unit in UNITS if cell in unit for other in unit}
    found = 0
    for digit in set(range(1, 10)) - {cells[peer] for peer in peers}:
        found += backtrack([*cells[:cell], digit, *cells[cell + 1 :]], limit - found)
        if found >= limit:
            break
    return found


def test_known_puzzles() -> None:
    result = solve(boards(EASY, HARD, EMPTY, CONTRADICTORY, NO_SOLUTION), limit=2)
    assert result.count.tolist() == [1, 1, 2, 0, 0]
    assert board.to_text(result.first[0]) == EASY_SOLUTION
    assert is_solution(result.first[:3]).all()
    assert keeps_givens(boards(EASY, HARD), result.first[:2]).all()
    assert is_singles_solvable(boards(EASY, HARD, EMPTY)).tolist() == [True, False, False]


def test_counts_agree_with_plain_backtracking() -> None:
    rng = np.random.default_rng(0)
    grids = random_grids(40, rng)
    puzzles = np.where(rng.random(grids.shape) < 0.45, grids, 0).astype(np.uint8)
    puzzles[::4, 0] = puzzles[::4, 0] % 9 + 1  # some with a wrong given
    counts = solve(puzzles, limit=3).count
    assert counts.tolist() == [backtrack(puzzle.tolist(), 3) if _is_consistent(puzzle) else 0 for puzzle in puzzles]
    assert len(set(counts.tolist())) >= 3


def _is_consistent(puzzle: np.ndarray) -> bool:
    return board.find_contradiction(puzzle) is None


def test_singles_never_lead_astray() -> None:
    """Whatever propagation decides is in the only solution, and a contradiction means that there is none."""
    rng = np.random.default_rng(1)
    grids = random_grids(200, rng)
    puzzles = np.where(rng.random(grids.shape) < 0.4, grids, 0).astype(np.uint8)
    candidates, broken = propagate(to_candidates(puzzles))
    assert not broken.any()
    decided = to_boards(candidates)
    assert ((decided == 0) | (decided == grids)).all()
    assert ((candidates >> (grids.T.astype(np.uint16) - 1)) & 1).all()  # the true digit stays a candidate


def test_random_grids_are_solved_and_distinct() -> None:
    grids = random_grids(500, np.random.default_rng(2))
    assert is_solution(grids).all()
    assert len(np.unique(grids, axis=0)) == 500
    counts = np.stack([(grids == digit).mean(axis=0) for digit in range(1, 10)])  # every digit everywhere
    assert abs(counts - 1 / 9).max() < 5 * (1 / 9 * 8 / 9 / 500) ** 0.5


@pytest.mark.parametrize("name", ["kaggle_20k", "clue17_49151"])
def test_real_puzzles_and_an_independent_solver_agree(sudoku_data: Path, name: str) -> None:
    with gzip.open(sudoku_data / f"{name}.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))[:2000]
    puzzles = boards(*(row["puzzle"] for row in rows))
    result = solve(puzzles, limit=2)
    assert (result.count == 1).all()
    assert (result.first == boards(*(row["solution"] for row in rows))).all()
    assert is_singles_solvable(puzzles).tolist() == [row["singles_solvable"] == "1" for row in rows]
