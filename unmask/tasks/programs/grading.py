"""Grades programs: finds the program in a model's text, runs it, and compares its value with the right answer."""

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
from unmask.tasks.programs.sandbox import SECONDS, run_programs
from unmask.tasks.programs.verdict import Outcome
from unmask.tasks.programs.worker import SandboxFailed

_DEF = re.compile(r"^def\b", re.MULTILINE)
_FENCE = re.compile(r"[ \t]*```")
_OUR_FENCES = ("", "python", "python3", "py")
"""What stands after the fence of a block that may be the program."""
_PREAMBLE = re.compile(  # lines of code that no prose looks like: imports, decorators, comments, numbers with a name
    r"import [\w.]+|from [\w.]+ import |@\w|#|[A-Za-z_]\w* *= *-?[0-9][0-9._]*[ \t]*(#.*)?$"
)


def locate(text: str) -> str | None:
    """Finds the program in `text` by its lines alone; None if there is none.

    That is the first fenced block (```, ```python) with a `def` at a line start, without the fences; else all from the
    first such `def` on, with the imports, decorators and named numbers right above it. Takes time linear in the text,
    whatever it holds.
    """
    text = text.replace("\r\n", "\n")
    lines = text.split("\n")
    for block in _iterate_blocks(lines):
        if _DEF.search(block):
            return block
    for number, line in enumerate(lines):
        if _DEF.match(line):
            rest = lines[_find_preamble(lines, number) :]
            end = next((i for i, each in enumerate(rest) if _FENCE.match(each)), len(rest))
            return "\n".join(rest[:end])
    return None


def _iterate_blocks(lines: list[str]) -> Iterator[str]:
    """Yields the insides of fenced blocks; one that is never closed goes on to the end."""
    start: int | None = None
    is_ours = False
    for number, line in enumerate(lines):
        if not _FENCE.match(line):
            continue
        if start is None:
            start, is_ours = number + 1, line.strip(" \t").removeprefix("```").lstrip(" \t").lower() in _OUR_FENCES
            continue
        if is_ours:
            yield "\n".join(lines[start:number])
        start = None
    if start is not None and is_ours:
        yield "\n".join(lines[start:])


def _find_preamble(lines: list[str], start: int) -> int:
    """Finds the first of the lines right above the `def` in line `start` that belong to it."""
    first = start
    for number in range(start - 1, -1, -1):
        if _PREAMBLE.match(lines[number]):
            first = number
        elif lines[number].strip():
            break
    return first


@dataclass(frozen=True)
class Judgement:
    """The verdict on one text.

    Attributes:
        program: what was run, or tried; None if the text holds no program.
        value: what it returned, if that was a number.
        output: the beginning of what it printed if it gave a number; else why it did not.
        is_correct: whether `value` matches the right answer; false as well if the program was not graded.
        reason: `correct`, or one of `verdict.REASONS` but `ran`.
    """

    program: str | None
    value: float | int | None
    output: str
    is_correct: bool
    reason: str

    @property
    def is_graded(self) -> bool:
        """False if the machine could not run the program."""
        return self.reason != "not_graded"


def judge(
    texts: Sequence[str],
    golds: Sequence[float | int | None],
    *,
    seconds: float = SECONDS,
    workers: int | None = None,
    update: Callable[[int], None] | None = None,
) -> list[Judgement]:
    """Finds the program in each text, runs it (the same one once only), and compares its value with the right answer.

    Where the right answer is None, the program is run, and is not correct. A program that the machine could not run is
    `not_graded`; so are all if no sandbox can be started. `update` is called with how many texts are done; the rest is
    as in `run_programs`.
    """
    located = [locate(text) for text in texts]
    programs = list(dict.fromkeys(program for program in located if program is not None))
    known = len(texts) - len(programs)  # texts that need no run of their own

    def report(done: int) -> None:
        if update is not None:
            update(known + done)

    try:
        outcomes = run_programs(programs, seconds=seconds, workers=workers, update=report)
    except SandboxFailed as error:
        outcomes = [Outcome.not_graded(str(error), program) for program in programs]
    by_program = dict(zip(programs, outcomes, strict=True))
    return [
        _judge(None if program is None else by_program[program], gold)
        for program, gold in zip(located, golds, strict=True)
    ]


def _judge(outcome: Outcome | None, gold: float | int | None) -> Judgement:
    if outcome is None:
        return Judgement(None, None, "no program in this text", False, "no_program")
    if outcome.value is None:
        return Judgement(outcome.program, None, outcome.output, False, outcome.reason)
    is_correct = gold is not None and matches(outcome.value, gold)
    return Judgement(outcome.program, outcome.value, outcome.output, is_correct, "correct" if is_correct else "wrong")


@dataclass(frozen=True)
class ProgramRow:
    """A row of a file of programs, its program and the right answer."""

    row: dict[str, Any]
    program: str
    gold: float | int

    def with_judgement(self, judgement: Judgement) -> dict[str, Any]:
        """Returns the row with its verdict."""
        verdict = {"value": judgement.value, "output": judgement.output}
        is_correct = judgement.is_correct if judgement.is_graded else None
        return self.row | verdict | {"correct": is_correct, "reason": judgement.reason}


@dataclass(frozen=True)
class ProgramsGrade:
    """The grade of a file.

    Attributes:
        n: programs that were graded.
        correct: those of them that are right.
        accuracy: their share; None if none was graded.
        interval: Wilson's, 95%, of the accuracy.
        reasons: counts of the programs that are not right.
        not_graded: programs that the machine could not run; they count nowhere else.
    """

    n: int
    correct: int
    accuracy: float | None
    interval: tuple[float, float] | None
    reasons: dict[str, int]
    not_graded: int


def read_programs(path: Path) -> list[ProgramRow]:
    """Reads JSON lines `{"question": .., "program": .., "answer": ..}`; the question may be absent.

    Raises:
        UserError: a line is not such an object, with file, line and field.
    """
    rows = [_read_row(row, where) for where, row in files.read_json_lines(path)]
    if not rows:
        raise UserError(f"{path}: holds no program")
    return rows


def judge_rows(rows: Sequence[ProgramRow], update: Callable[[int], None] | None = None) -> list[Judgement]:
    """Runs each program, and compares its value with the answer. `update` is called with how many are done."""
    return judge([row.program for row in rows], [row.gold for row in rows], update=update)


def grade(judgements: Sequence[Judgement]) -> ProgramsGrade:
    """Sums up one judgement or more."""
    reasons = Counter(judgement.reason for judgement in judgements)
    correct, not_graded = reasons.pop("correct", 0), reasons.pop("not_graded", 0)
    n = len(judgements) - not_graded
    accuracy, interval = (correct / n, wilson(correct, n)) if n else (None, None)
    return ProgramsGrade(n, correct, accuracy, interval, dict(reasons.most_common()), not_graded)


def say_not_graded(outputs: Sequence[str], total: int) -> str:
    """Says how many programs of `total` could not be run, and why: `outputs` are their judgements'."""
    why = "; ".join(text for text, _ in Counter(outputs).most_common(2))
    return f"{len(outputs)} of {total} programs could not be run, and are not graded ({why})"


def _read_row(row: dict[str, Any], where: str) -> ProgramRow:
    if not isinstance(row.get("question", ""), str):
        raise UserError(f"{where}: question={row['question']!r} must be a string")
    if not isinstance(row.get("program"), str):
        raise UserError(f"{where}: needs the string `program`: what the model wrote")
    return ProgramRow(row, row["program"], read_answer(row.get("answer"), where))
