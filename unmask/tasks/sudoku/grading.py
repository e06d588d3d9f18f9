"""Grades answers, and names what is wrong with them. Dimensions: N boards."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmask import files
from unmask.errors import UserError
from unmask.evaluation.statistics import wilson
from unmask.tasks.sudoku import board
from unmask.tasks.sudoku.board import Boards
from unmask.tasks.sudoku.solver import solve


def is_solved(puzzles: Boards, answers: NDArray[Any]) -> NDArray[np.bool_]:
    """True where *every* given is kept and all 27 units hold every digit once: (N,)."""
    return board.keeps_givens(puzzles, answers) & board.is_solution(answers)


def has_one_solution(puzzles: Boards) -> NDArray[np.bool_]:
    """True where exactly one grid solves a puzzle, as far as can be found out: (N,)."""
    solutions = solve(puzzles, limit=2)
    return solutions.is_certain & (solutions.count == 1)


def find_reason(puzzle: NDArray[np.uint8], answer: str) -> str | None:
    """Finds the first reason why `answer` is wrong, such as `broken_row`; None if it is right."""
    if len(answer) != 81:
        return "wrong_length"
    if not set(answer) <= set("123456789"):
        return "bad_symbol"
    cells = np.array([[int(symbol) for symbol in answer]])
    if not board.keeps_givens(puzzle[None], cells)[0]:
        return "changed_clue"
    broken = ~board.complete_units(cells)[0].reshape(3, 9).all(axis=1)
    return next((f"broken_{kind}" for kind, is_broken in zip(board.UNIT_KINDS, broken, strict=True) if is_broken), None)


@dataclass(frozen=True)
class SudokuGrade:
    """The grade of a file of answers. `exact` counts the puzzles with one solution that were answered with it."""

    n: int
    correct: int
    reasons: dict[str, int]
    n_unique: int
    exact: int

    def as_dict(self) -> dict[str, Any]:
        """Returns the grade as JSON, with the shares and their 95 % intervals (Wilson)."""
        of_unique = wilson(self.exact, self.n_unique) if self.n_unique else None
        return asdict(self) | {
            "accuracy": self.correct / self.n,
            "interval": wilson(self.correct, self.n),
            "exact_interval": of_unique,
        }


def grade_file(path: Path) -> tuple[SudokuGrade, list[dict[str, Any]]]:
    """Grades JSON lines `{"puzzle": .., "answer": ..}`; returns the grade, and each row with its verdict.

    Raises:
        UserError: a line (named) is not such an object, or its puzzle is malformed. A malformed *answer* is a
            wrong answer.
    """
    puzzles, rows = _read_answers(path)
    reasons = [find_reason(puzzle, row["answer"].strip()) for puzzle, row in zip(puzzles, rows, strict=True)]
    is_unique = has_one_solution(puzzles)
    correct = np.array([r is None for r in reasons])
    grade = SudokuGrade(
        n=len(rows),
        correct=int(correct.sum()),
        reasons=dict(Counter(r for r in reasons if r is not None)),
        n_unique=int(is_unique.sum()),
        exact=int((correct & is_unique).sum()),
    )
    verdicts = ({"correct": reason is None, "reason": reason or "correct"} for reason in reasons)
    return grade, [row | verdict for row, verdict in zip(rows, verdicts, strict=True)]


def _read_answers(path: Path) -> tuple[Boards, list[dict[str, Any]]]:
    puzzles, rows = [], []
    for where, row in files.read_json_lines(path):
        if not all(isinstance(row.get(key), str) for key in ("puzzle", "answer")):
            raise UserError(f"{where}: needs the strings `puzzle` and `answer`")
        puzzles.append(board.parse(row["puzzle"], where))
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no answer")
    return np.stack(puzzles), rows
