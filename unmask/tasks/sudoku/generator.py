"""A generator of puzzles with unique solutions, every one on a solved grid of its own.

A puzzle is dug: from a random solved grid, cells are emptied in random order as long as the rest determines them. For
`singles` that test is naked and hidden singles, which can only lead to the one solution. For `harder` it is search,
and the result must not be solvable by singles. All in batches (see `solver`), each with random numbers of its own, so
that several processes make the puzzles that one makes. Generated puzzles are kept on disk. Dimensions: N boards.
"""

import hashlib
import io
import json
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from unmask import files, formats, noise
from unmask.errors import UserError
from unmask.files import exclusive
from unmask.machine import cpus, require_memory
from unmask.noise import Purpose
from unmask.progress import console, progress, warn
from unmask.tasks.sudoku.board import Boards, PuzzleSet, check_puzzles
from unmask.tasks.sudoku.solver import (
    ALL_DIGITS,
    is_decided,
    is_singles_solvable,
    propagate,
    solve_candidates,
    to_boards,
    to_candidates,
)

Difficulty = Literal["singles", "harder"]
FEWEST_GIVENS, MOST_GIVENS = 24, 50
_BATCH = 4096
_FIRST_STEP = 32  # cells emptied at once at first; halved whenever the test fails
_MAX_FRUITLESS = 20  # batches without a single puzzle before the settings are refused

Test = Callable[[Boards, NDArray[np.bool_], Boards], NDArray[np.bool_]]


def generate(
    count: int,
    *,
    givens: tuple[int, int],
    difficulty: Difficulty,
    seed: int,
    processes: int = 1,
    on_progress: Callable[[int], None] = lambda done: None,
) -> tuple[Boards, Boards]:
    """Generates `count` puzzles (N, 81) and their solutions (N, 81), the same with any number of processes.

    The number of givens is drawn uniformly from [lo, hi]. Grids that cannot be dug that far are dropped: numbers below
    about 27 come less often.

    Raises:
        UserError: `givens` outside 24 to 50, or settings for which no puzzle is found.
    """
    check_givens(givens)
    puzzles, solutions, found, fruitless, batch = [], [], 0, 0, 0
    with _batches(processes, givens, difficulty, seed) as make:
        while found < count:
            size = min(_BATCH, max(256, 2 * (count - found)))
            some, solved = make(batch, size)
            puzzles.append(some)
            solutions.append(solved)
            found += len(some)
            batch += 1
            fruitless = 0 if len(some) else fruitless + 1
            if fruitless == _MAX_FRUITLESS:
                raise UserError(
                    f"data.givens={list(givens)} with data.difficulty={difficulty}: no such puzzle in "
                    f"{fruitless * size} attempts; with more givens, fewer puzzles need more than singles"
                )
            on_progress(min(found, count))
    return np.concatenate(puzzles)[:count], np.concatenate(solutions)[:count]


def _make_batch(
    batch: int, size: int, givens: tuple[int, int], difficulty: Difficulty, seed: int
) -> tuple[Boards, Boards]:
    """Digs `size` grids; returns the puzzles that came as far as their number of givens, and their solutions."""
    rng = np.random.default_rng(noise.integer(seed, Purpose.GENERATE, batch))
    grids = random_grids(size, rng)
    targets = rng.integers(givens[0], givens[1] + 1, size=size)
    dug = _dig(grids, targets, rng, _singles_restore) if difficulty == "singles" else _dig_harder(grids, targets, rng)
    complete = (dug > 0).sum(axis=1) == targets
    return dug[complete], grids[complete]


@contextmanager
def _batches(
    processes: int, givens: tuple[int, int], difficulty: Difficulty, seed: int
) -> Iterator[Callable[[int, int], tuple[Boards, Boards]]]:
    """Yields a function that returns batches by number, from 0 on, and their size; others are made ahead of it."""
    settings = (givens, difficulty, seed)
    if processes == 1:
        yield lambda batch, size: _make_batch(batch, size, *settings)
        return
    ahead: deque[Future[tuple[Boards, Boards]]] = deque()  # the next ones, of full size: only the last are smaller
    with ProcessPoolExecutor(processes, get_context("spawn"), _leave_interrupts_to_the_parent) as pool:

        def make(batch: int, size: int) -> tuple[Boards, Boards]:
            if size < _BATCH:
                return _make_batch(batch, size, *settings)
            while len(ahead) < 2 * processes:
                ahead.append(pool.submit(_make_batch, batch + len(ahead), size, *settings))
            return ahead.popleft().result()

        try:
            yield make
        except BrokenProcessPool as error:
            raise UserError(
                "a process that generated puzzles was killed, perhaps for want of memory; or a script trains without "
                "`if __name__ == '__main__':`, which other processes need. Ask for fewer data.puzzles, or add that line"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check_givens(givens: tuple[int, int]) -> None:
    """Raises `UserError` if the generator cannot make such puzzles."""
    low, high = givens
    if low > high:
        raise UserError(f"givens from {low} to {high}: the lower end comes first")
    if low < FEWEST_GIVENS:
        raise UserError(
            f"{low} givens: below {FEWEST_GIVENS} a random grid can hardly ever be dug that far with a unique solution "
            f"(the least is 17); use {FEWEST_GIVENS} to {MOST_GIVENS}, or data.path for such puzzles"
        )
    if high > MOST_GIVENS:
        raise UserError(
            f"{high} givens: above {MOST_GIVENS} so little is hidden that a puzzle is no test; "
            f"use {FEWEST_GIVENS} to {MOST_GIVENS}"
        )


def random_grids(count: int, rng: np.random.Generator) -> Boards:
    """Makes solved grids (N, 81): three random boxes, then guesses in the tightest cell, each with propagation."""
    done: list[Boards] = []
    while (found := sum(map(len, done))) < count:
        candidates = _random_diagonal(max(64, int(1.2 * (count - found))), rng)
        while candidates.shape[1]:
            candidates, broken = propagate(candidates)
            candidates = candidates[:, ~broken]
            solved = is_decided(candidates).all(axis=0)
            done.append(to_boards(candidates[:, solved]))
            candidates = candidates[:, ~solved]
            _guess(candidates, rng)
    return np.concatenate(done)[:count]


def _random_diagonal(count: int, rng: np.random.Generator) -> NDArray[np.uint16]:
    """Makes candidates (81, N) with random boxes on the diagonal, which do not constrain each other."""
    candidates = np.full((81, count), ALL_DIGITS)
    for box in range(3):
        digits = rng.permuted(np.tile(np.arange(9), (count, 1)), axis=1).T
        cells = [(3 * box + i) * 9 + 3 * box + j for i in range(3) for j in range(3)]
        candidates[cells] = np.left_shift(1, digits)
    return candidates


def _guess(candidates: NDArray[np.uint16], rng: np.random.Generator) -> None:
    """Sets, in place, one of each board's tightest open cells to one of its candidates."""
    size = np.bitwise_count(candidates)
    cell = np.where(size > 1, size + rng.random(size.shape, dtype=np.float32), 99).argmin(axis=0)
    board = np.arange(candidates.shape[1])
    options = (candidates[cell, board] >> np.arange(9, dtype=np.uint16)[:, None]) & 1
    digit = np.where(options, rng.random(options.shape, dtype=np.float32), -1).argmax(axis=0)
    candidates[cell, board] = np.left_shift(1, digit)


def _dig_harder(grids: Boards, targets: NDArray[np.int64], rng: np.random.Generator) -> Boards:
    """Digs below the target, keeps what singles cannot solve, and fills up with givens that do not change that."""
    floor = np.minimum(targets, FEWEST_GIVENS)
    dug = _dig(grids, floor, rng, _only_solution)
    hard = ~is_singles_solvable(dug)
    result = grids.copy()  # a full grid never has `targets` givens: it stands for failure
    result[hard] = _add_givens(dug[hard], grids[hard], targets[hard], rng)
    return result


def _dig(grids: Boards, targets: NDArray[np.int64], rng: np.random.Generator, test: Test) -> Boards:
    """Empties cells in random order while `test` passes and more than `targets` are left; (N, 81)."""
    n = len(grids)
    puzzles = grids.copy()
    rank = rng.permuted(np.tile(np.arange(81), (n, 1)), axis=1)  # when a cell's turn comes
    turn = np.zeros(n, dtype=np.int64)
    step = np.full(n, _FIRST_STEP)
    while True:
        missing = (puzzles > 0).sum(axis=1) - targets
        open_ = np.flatnonzero((missing > 0) & (missing <= 81 - turn))  # boards that can still reach their target
        if not len(open_):
            return puzzles
        size = np.minimum(step[open_], (puzzles[open_] > 0).sum(axis=1) - targets[open_])
        first = turn[open_][:, None]
        emptied = (rank[open_] >= first) & (rank[open_] < first + size[:, None])
        trial = np.where(emptied, 0, puzzles[open_]).astype(np.uint8)
        passed = test(trial, emptied, grids[open_])
        puzzles[open_[passed]] = trial[passed]
        turn[open_] += np.where(passed, size, size == 1)
        step[open_] = np.where(passed, size, np.maximum(size // 2, 1))


def _singles_restore(puzzles: Boards, emptied: NDArray[np.bool_], grids: Boards) -> NDArray[np.bool_]:
    """True where singles give back the `emptied` cells; the rest then follows as it did before."""
    candidates, broken = propagate(to_candidates(puzzles), until_decided=emptied.T)
    return ~broken & (is_decided(candidates) | ~emptied.T).all(axis=0)


def _only_solution(puzzles: Boards, emptied: NDArray[np.bool_], grids: Boards) -> NDArray[np.bool_]:
    """True where the puzzle has no solution other than its grid, as far as that is cheap to find out.

    If singles give back the `emptied` cells, there is none. Else the search for another digit in the cell decides, but
    only where a single cell was emptied: for more of them, digging in smaller steps costs less than searching.
    """
    passed = _singles_restore(puzzles, emptied, grids)
    board = np.flatnonzero(~passed & (emptied.sum(axis=1) == 1))
    cell = emptied[board].argmax(axis=1)
    others = to_candidates(puzzles[board])
    others[cell, np.arange(len(board))] &= ~np.left_shift(np.uint16(1), grids[board, cell] - np.uint16(1))
    found = solve_candidates(others, limit=1)
    passed[board] = found.is_certain & (found.count == 0)
    return passed


def _add_givens(puzzles: Boards, grids: Boards, targets: NDArray[np.int64], rng: np.random.Generator) -> Boards:
    """Fills up to `targets` givens, so that singles still do not solve the board; fewer where that cannot be."""
    puzzles = puzzles.copy()
    order = rng.permuted(np.tile(np.arange(81), (len(puzzles), 1)), axis=1)
    for cell in order.T:
        board = np.flatnonzero((puzzles > 0).sum(axis=1) < targets)
        trial = puzzles[board]
        trial[np.arange(len(board)), cell[board]] = grids[board, cell[board]]
        still_hard = ~is_singles_solvable(trial)
        puzzles[board[still_hard]] = trial[still_hard]
    return puzzles


_VERSION = 1  # of the generator: another one makes other puzzles from the same seed


def load_or_generate(count: int, givens: tuple[int, int], difficulty: Difficulty, seed: int, folder: Path) -> PuzzleSet:
    """Loads the puzzles of these settings from the cache; the first process generates them, others wait for it."""
    require_memory(2 * 162 * count, f"data.puzzles={count}", "take fewer; each is drawn under new symmetries")
    settings = {"count": count, "givens": givens, "difficulty": difficulty, "seed": seed, "version": _VERSION}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / "sudoku" / f"{difficulty}_{givens[0]}-{givens[1]}_{count}_{digest}.npy"
    checksum = path.with_name(f"{path.name}.sha256")  # a table of plausible wrong digits looks like any other
    with exclusive(path):
        kept, problem = _read_table(path, checksum, count) if path.exists() else (None, None)
        if kept is not None:
            return kept
        if problem is not None:
            warn(f"{path}: was changed or damaged: {problem}. It is of the cache, and is made again now")
        with progress(f"Generating {count} puzzles ({difficulty}, {givens[0]}-{givens[1]} givens)", count) as update:
            puzzles, solutions = generate(
                count, givens=givens, difficulty=difficulty, seed=seed, processes=_processes(count), on_progress=update
            )
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate([puzzles, solutions], axis=1))
        files.write(checksum, f"{hashlib.sha256(buffer.getbuffer()).hexdigest()}\n")
        files.write(path, buffer.getvalue())
        console.print(f"Puzzles kept in {path}")
        return PuzzleSet(puzzles, solutions)


def _processes(count: int) -> int:
    """Returns how many processes are worth their start, which takes as long as some batches."""
    return min(cpus(), 1 + count // (8 * _BATCH))


def _read_table(path: Path, checksum: Path, count: int) -> tuple[PuzzleSet | None, str | None]:
    """Reads kept puzzles: them and None, or None and what is wrong with the file.

    One from before checksums were kept is taken if its puzzles fit their solutions, and gets a checksum.
    """
    try:
        boards = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(boards, np.ndarray) or boards.shape != (count, 162) or boards.dtype != np.uint8:
            return None, f"it is no table of {count} puzzles with their solutions"
        boards = np.array(boards)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if checksum.exists():
            is_right = formats.read_text(checksum, max_bytes=100).strip() == found
            return (PuzzleSet(boards[:, :81], boards[:, 81:]), None) if is_right else (None, "its checksum is another")
        puzzles = check_puzzles(boards[:, :81], boards[:, 81:], lambda row: f"row {row}")
        files.write(checksum, f"{found}\n")
        return puzzles, None
    except (OSError, EOFError, ValueError) as error:  # UserError is a ValueError
        return None, str(error)
