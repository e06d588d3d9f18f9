"""Whether what a model says solves a problem."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unmask.tasks.programs.answers import matches
from unmask.tasks.programs.extract import locate
from unmask.tasks.programs.sandbox import SECONDS, run_programs
from unmask.tasks.programs.verdict import Outcome

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
