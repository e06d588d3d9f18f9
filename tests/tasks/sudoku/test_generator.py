from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from unmask.errors import UserError
from unmask.tasks.sudoku import generator
from unmask.tasks.sudoku.board import is_solution, keeps_givens
from unmask.tasks.sudoku.generator import generate
from unmask.tasks.sudoku.solver import is_singles_solvable, solve


@pytest.mark.parametrize("difficulty", ["singles", "harder"])
@pytest.mark.parametrize("givens", [(24, 24), (30, 34), (50, 50)])
def test_puzzles_are_what_was_asked_for(difficulty: str, givens: tuple[int, int]) -> None:
    count = 60 if difficulty == "singles" else 8
    puzzles, solutions = generate(count, givens=givens, difficulty=difficulty, seed=3)
    assert puzzles.shape == solutions.shape == (count, 81)
    num_givens = (puzzles > 0).sum(axis=1)
    assert num_givens.min() >= givens[0]
    assert num_givens.max() <= givens[1]
    assert is_solution(solutions).all()
    assert keeps_givens(puzzles, solutions).all()
    assert (solve(puzzles, limit=2).count == 1).all()
    assert (is_singles_solvable(puzzles) == (difficulty == "singles")).all()
    assert len(np.unique(solutions, axis=0)) == count


def test_the_seed_decides() -> None:
    def make(seed: int) -> np.ndarray:
        return generate(50, givens=(30, 37), difficulty="singles", seed=seed)[0]

    assert (make(0) == make(0)).all()
    assert (make(0) != make(1)).any()


def test_several_processes_make_what_one_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "_BATCH", 300)  # so that there are several of full size, and then smaller ones

    def make(processes: int) -> list[np.ndarray]:
        seen: list[int] = []
        found = generate(
            1000, givens=(40, 45), difficulty="singles", seed=3, processes=processes, on_progress=seen.append
        )
        assert seen[-1] == 1000
        return list(found)

    assert all((one == two).all() for one, two in zip(make(1), make(2), strict=True))


@pytest.mark.parametrize(("givens", "why"), [((23, 30), "hardly ever"), ((30, 51), "no test"), ((31, 30), "lower end")])
def test_givens_out_of_range_say_why(givens: tuple[int, int], why: str) -> None:
    with pytest.raises(UserError, match=why):
        generate(1, givens=givens, difficulty="singles", seed=0)


def _load(folder: str) -> bytes:
    return generator.load_or_generate(100, (40, 45), "singles", 7, Path(folder)).puzzles.tobytes()


def test_processes_that_ask_at_once_share_one_cache(tmp_path: Path) -> None:
    with get_context("spawn").Pool(3) as pool:
        results = pool.map(_load, [str(tmp_path)] * 3)
    assert len(set(results)) == 1
    assert len(list(tmp_path.rglob("*.npy"))) == 1
    assert not list(tmp_path.rglob("*.partial"))


def test_the_cache_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _load(str(tmp_path))
    monkeypatch.setattr(generator, "generate", pytest.fail)
    assert _load(str(tmp_path)) == first
