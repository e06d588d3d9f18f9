"""Grades a file of programs.

The program in what a model says.

Whether what a model says solves a problem.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask import files
from unmask.errors import UserError
from unmask.evaluation.statistics import wilson
from unmask.tasks.programs.answers import matches, read_answer
from unmask.tasks.programs.sandbox import MAX_LENGTH, SECONDS, compiling_part, run_programs
from unmask.tasks.programs.verdict import Outcome

_DEF = re.compile(r"^def\b", re.MULTILINE)
_FENCE = re.compile(r"[ \t]*```")
_OUR_FENCE = re.compile(r"[ \t]*```[ \t]*(python|python3|py)?[ \t]*$", re.IGNORECASE)
_PREAMBLE = re.compile(  # lines of code that no prose looks like: imports, decorators, comments, numbers with a name
    r"import [\w.]+|from [\w.]+ import |@\w|#|[A-Za-z_]\w* *= *-?[0-9][0-9._]*[ \t]*(#.*)?$"
)


def locate(text: str) -> str | None:
    """Where the program is in `text`, by its lines alone, or None: the first fenced block (```, ```python) with a `def`
    at a line start, without the fences; else all from the first such `def` on, with the imports, decorators and named
    numbers right above it.

    Takes time linear in the text, whatever it holds.
    """
    text = text.replace("\r\n", "\n")
    lines = text.split("\n")
    for block in _blocks(lines):
        if _DEF.search(block):
            return block
    for number, line in enumerate(lines):
        if _DEF.match(line):
            return "\n".join(_until_fence(lines[_preamble(lines, number) :]))
    return None


def extract(text: str) -> str | None:
    """The program in `text`, as `locate` finds it, without the trailing lines that keep it from compiling. None: none.

    Compiling is done in a sandbox, which takes a moment: `judge` does it for many texts at once.
    """
    program = locate(text)
    return program if program is None or len(program) > MAX_LENGTH else compiling_part(program)


def _blocks(lines: list[str]) -> Iterator[str]:
    """The insides of fenced blocks; one that is never closed goes on to the end."""
    start: int | None = None
    is_ours = False
    for number, line in enumerate(lines):
        if not _FENCE.match(line):
            continue
        if start is None:
            start, is_ours = number + 1, _OUR_FENCE.match(line) is not None
            continue
        if is_ours:
            yield "\n".join(lines[start:number])
        start = None
    if start is not None and is_ours:
        yield "\n".join(lines[start:])


def _until_fence(lines: list[str]) -> list[str]:
    return lines[: next((number for number, line in enumerate(lines) if _FENCE.match(line)), len(lines))]


def _preamble(lines: list[str], start: int) -> int:
    """The number of the first of the lines that belong to the `def` in line `start` and stand right above it."""
    first = start
    for number in range(start - 1, -1, -1):
        if _PREAMBLE.match(lines[number]):
            first = number
        elif lines[number].strip():
            break
    return first


REASONS = ("correct", "wrong", "no_program", "syntax", "blocked", "error", "timeout", "memory")


@dataclass(frozen=True)
class Judgement:
    """What came of a text.

    Attributes:
        program: what was run, or tried; None if the text holds no program.
        value: what it returned, if that was a number.
        output: the beginning of what it printed if it gave a number; else why it did not.
        is_correct: whether `value` matches the right answer.
        reason: one of `REASONS`.
    """

    program: str | None
    value: float | None
    output: str
    is_correct: bool
    reason: str


def judge(
    texts: Sequence[str],
    golds: Sequence[float | None],
    *,
    seconds: float = SECONDS,
    workers: int | None = None,
    update: Callable[[int], None] | None = None,
) -> list[Judgement]:
    """Finds the program in each text, runs it (the same one once only), and holds its value against the right answer.

    A right answer None is not known: the program is run, and is not correct. `update` is called with how many texts are
    done; the rest is as in `run_programs`.
    """
    located = [locate(text) for text in texts]
    programs = list(dict.fromkeys(program for program in located if program is not None))
    known = len(texts) - len(programs)  # what needs no run of its own

    def report(done: int) -> None:
        if update is not None:
            update(known + done)

    outcomes = run_programs(programs, seconds=seconds, workers=workers, update=report)
    by_program = dict(zip(programs, outcomes, strict=True))
    return [
        _judgement(None if program is None else by_program[program], gold)
        for program, gold in zip(located, golds, strict=True)
    ]


def _judgement(outcome: Outcome | None, gold: float | None) -> Judgement:
    if outcome is None:
        return Judgement(None, None, "no program in this text", False, "no_program")
    if outcome.value is None:
        return Judgement(outcome.program, None, outcome.output, False, outcome.reason)
    is_correct = gold is not None and matches(outcome.value, gold)
    return Judgement(outcome.program, outcome.value, outcome.output, is_correct, "correct" if is_correct else "wrong")


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
    problems = [_problem(row, where) for where, row in files.read_json_lines(path)]
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
