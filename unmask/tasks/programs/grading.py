"""Grades a file of programs."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask import jsonl
from unmask.errors import UserError
from unmask.interval import wilson
from unmask.tasks.programs.answers import read_answer
from unmask.tasks.programs.judging import Judgement, judge


@dataclass(frozen=True)
class Problem:
    """A row of the file, and what was read from it."""

    row: dict[str, Any]
    program: str
    gold: float

    def judged(self, judgement: Judgement) -> dict[str, Any]:
        """The row, with what came of it."""
        verdict = {"value": judgement.value, "output": judgement.output}
        return self.row | verdict | {"correct": judgement.is_correct, "reason": judgement.reason}


@dataclass(frozen=True)
class Grade:
    """The grade of a file. `interval`: Wilson's, 95%, of the accuracy; `reasons` counts the programs not correct."""

    n: int
    correct: int
    accuracy: float
    interval: tuple[float, float]
    reasons: dict[str, int]


def read_problems(path: Path) -> list[Problem]:
    """Reads JSON lines `{"question": .., "program": .., "answer": ..}`; the question may be absent.

    Raises:
        UserError: a line is not such an object, with file, line and field.
    """
    problems = [_problem(row, where) for where, row in jsonl.read(path)]
    if not problems:
        raise UserError(f"{path}: holds no program")
    return problems


def judge_problems(problems: Sequence[Problem], update: Callable[[int], None] | None = None) -> list[Judgement]:
    """Runs each program, and holds its value against the answer. `update` is called with how many are done."""
    return judge([problem.program for problem in problems], [problem.gold for problem in problems], update=update)


def grade(judgements: Sequence[Judgement]) -> Grade:
    """Sums up one judgement or more."""
    n = len(judgements)
    reasons = Counter(judgement.reason for judgement in judgements)
    correct = reasons.pop("correct", 0)
    return Grade(n, correct, correct / n, wilson(correct, n), dict(reasons.most_common()))


def _problem(row: dict[str, Any], where: str) -> Problem:
    if not isinstance(row.get("question", ""), str):
        raise UserError(f"{where}: question={row['question']!r} must be a string")
    if not isinstance(row.get("program"), str):
        raise UserError(f"{where}: needs the string `program`: what the model wrote")
    return Problem(row, row["program"], read_answer(row.get("answer"), where))
