"""Batched Sudoku solving in numpy: thousands of boards are propagated at once.

A board's knowledge is a candidate array of 9-bit sets, bit d - 1 for digit d. Arrays are laid out
`(81, N)`, cells first, so that every operation runs along contiguous memory over the N boards.

Dimensions: N boards, 81 cells in row-major order.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unmask.tasks.sudoku.board import Boards

Candidates = NDArray[np.uint16]  # (81, N), bit sets of the digits still possible

ALL_DIGITS = np.uint16(0x1FF)
_MAX_POSITIONS = 300_000  # searched for one board; 17 givens take up to 2,000, an empty board 200,000
_CHUNK = 4096  # boards propagated together: their candidates stay within a core's cache


def to_candidates(boards: Boards) -> Candidates:
    """Makes bit sets of `boards` (N, 81): a given's own digit, all nine digits for an empty cell."""
    cells = boards.T.astype(np.uint16)
    return np.where(cells > 0, np.left_shift(1, cells - (cells > 0)), ALL_DIGITS).astype(np.uint16)


def to_boards(candidates: Candidates) -> Boards:
    """Makes boards (N, 81) of the cells that have one candidate left; 0 elsewhere."""
    decided = is_decided(candidates)
    digits = np.log2(np.where(decided, candidates, 1)).astype(np.uint8) + 1
    return np.ascontiguousarray(np.where(decided, digits, 0).T.astype(np.uint8))


def is_decided(candidates: Candidates) -> NDArray[np.bool_]:
    """True where one candidate is left."""
    return (candidates != 0) & ((candidates & (candidates - 1)) == 0)


def _once_and_union(parts: list[NDArray[np.uint16]]) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Returns the digits that occur in exactly one of `parts`, and in any of them."""
    once = parts[0].copy()
    twice = np.zeros_like(once)
    for part in parts[1:]:
        twice |= once & part
        once |= part
    return once & ~twice, once


def _unit_views(candidates: Candidates) -> list[tuple[list[NDArray[np.uint16]], tuple[int, ...]]]:
    """Returns the nine cells of all nine rows, columns and boxes, each with the shape that spreads a unit's value."""
    n = candidates.shape[1]
    grid = candidates.reshape(9, 9, n)
    boxes = candidates.reshape(3, 3, 3, 3, n)  # band, row in band, stack, column in stack
    return [
        ([grid[:, j] for j in range(9)], (9, 1, n)),
        ([grid[i] for i in range(9)], (1, 9, n)),
        ([boxes[:, i, :, j] for i in range(3) for j in range(3)], (3, 1, 3, 1, n)),
    ]


def _spread(candidates: Candidates, values: NDArray[np.uint16], shape: tuple[int, ...]) -> NDArray[np.uint16]:
    full = (9, 9, shape[-1]) if len(shape) == 3 else (3, 3, 3, 3, shape[-1])
    return np.broadcast_to(values.reshape(shape), full).reshape(candidates.shape)


def _round(candidates: Candidates) -> NDArray[np.bool_]:
    """Sweeps once for naked, then hidden singles, in place; returns which boards (N,) became contradictory."""
    decided = is_decided(candidates)
    placed = np.where(decided, candidates, 0).astype(np.uint16)
    broken = np.zeros(candidates.shape[1], dtype=bool)
    taken = np.zeros_like(candidates)
    for parts, shape in _unit_views(placed):
        once, union = _once_and_union(parts)
        broken |= (once != union).reshape(-1, shape[-1]).any(axis=0)  # a digit placed twice
        taken |= _spread(candidates, union, shape)
    np.bitwise_and(candidates, ~taken, out=candidates, where=~decided)

    only_here = np.zeros_like(candidates)
    for parts, shape in _unit_views(candidates):
        once, union = _once_and_union(parts)
        broken |= (union != ALL_DIGITS).reshape(-1, shape[-1]).any(axis=0)  # a digit with no place left
        only_here |= _spread(candidates, once, shape)
    only_here &= candidates
    np.copyto(candidates, only_here, where=only_here != 0)
    broken |= (candidates == 0).any(axis=0)
    return broken


def propagate(
    candidates: Candidates, *, until_decided: NDArray[np.bool_] | None = None
) -> tuple[Candidates, NDArray[np.bool_]]:
    """Applies naked and hidden singles to a fixed point, or until the cells `until_decided` (81, N) are decided.

    Returns new candidates (81, N), and True for each contradictory board (N,). A hidden single with two digits for one
    cell shows up as a digit without a place in the next sweep, so no contradiction is missed at the fixed point.
    """
    result = candidates.copy()
    broken = np.zeros(candidates.shape[1], dtype=bool)
    for start in range(0, candidates.shape[1], _CHUNK):
        active = np.arange(start, min(start + _CHUNK, candidates.shape[1]))
        work = result[:, active]
        while len(active):
            before = work.copy()
            now_broken = _round(work)
            stopped = now_broken | (work == before).all(axis=0)
            if until_decided is not None:
                stopped |= (is_decided(work) | ~until_decided[:, active]).all(axis=0)
            if stopped.any():
                result[:, active[stopped]] = work[:, stopped]
                broken[active[now_broken]] = True
                active, work = active[~stopped], work[:, ~stopped]
    return result, broken


def is_singles_solvable(boards: Boards) -> NDArray[np.bool_]:
    """True where naked and hidden singles alone solve a board (N, 81)."""
    candidates, broken = propagate(to_candidates(boards))
    return ~broken & is_decided(candidates).all(axis=0)


@dataclass(frozen=True)
class Solutions:
    """The result of a search.

    Attributes:
        count: (N,) solutions found, at most the limit of the search.
        first: (N, 81) one of them; 0 if there is none.
        is_certain: (N,) False where the search was given up, so that there may be more.
    """

    count: NDArray[np.int64]
    first: Boards
    is_certain: NDArray[np.bool_]


def solve(boards: Boards, *, limit: int = 2) -> Solutions:
    """Solves `boards` (N, 81) by propagation and search, looking for up to `limit` solutions each.

    A puzzle takes a few positions to search, one with 17 givens hundreds; boards made to defeat a search take millions,
    and are given up.
    """
    return solve_candidates(to_candidates(boards), limit=limit)


def solve_candidates(candidates: Candidates, *, limit: int = 2) -> Solutions:
    """Solves candidate sets (81, N) as `solve` does; they may exclude digits that a board's givens would allow."""
    n = candidates.shape[1]
    count = np.zeros(n, dtype=np.int64)
    first = np.zeros((n, 81), dtype=np.uint8)
    searched = np.zeros(n, dtype=np.int64)
    stack = [(candidates, np.arange(n))]  # open positions and the boards that they belong to
    while stack:
        nodes, owner = _pop(stack)
        searched += np.bincount(owner, minlength=n)
        wanted = (count[owner] < limit) & (searched[owner] <= _MAX_POSITIONS)
        nodes, owner = nodes[:, wanted], owner[wanted]
        if not len(owner):
            continue
        nodes, broken = propagate(nodes)
        nodes, owner = nodes[:, ~broken], owner[~broken]
        solved = is_decided(nodes).all(axis=0)
        if solved.any():
            first[owner[solved]] = to_boards(nodes[:, solved])
            np.add.at(count, owner[solved], 1)
        if not solved.all():
            stack.append(_branch(nodes[:, ~solved], owner[~solved]))
    is_certain = (searched <= _MAX_POSITIONS) | (count >= limit)
    return Solutions(count=np.minimum(count, limit), first=first, is_certain=is_certain)


def _pop(stack: list[tuple[Candidates, NDArray[np.intp]]]) -> tuple[Candidates, NDArray[np.intp]]:
    """Takes the newest positions, at most a chunk: depth first, so that memory stays bounded."""
    nodes, owner = stack.pop()
    if len(owner) > _CHUNK:
        stack.append((nodes[:, :-_CHUNK], owner[:-_CHUNK]))
        nodes, owner = nodes[:, -_CHUNK:], owner[-_CHUNK:]
    return nodes, owner


def _branch(nodes: Candidates, owner: NDArray[np.intp]) -> tuple[Candidates, NDArray[np.intp]]:
    """Makes a position of every candidate of each position's tightest open cell."""
    size = np.bitwise_count(nodes)
    cell = np.where(size > 1, size, 10).argmin(axis=0)
    options = nodes[cell, np.arange(nodes.shape[1])]
    children, owners = [], []
    for digit in range(9):
        bit = np.uint16(1 << digit)
        has = (options & bit) != 0
        child = nodes[:, has]
        child[cell[has], np.arange(child.shape[1])] = bit
        children.append(child)
        owners.append(owner[has])
    return np.concatenate(children, axis=1), np.concatenate(owners)
