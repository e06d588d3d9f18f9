"""Grades solutions: runs each with its problem's tests in the sandbox, and estimates pass@k."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask import files
from unmask.errors import UserError
from unmask.evaluation.statistics import wilson
from unmask.tasks.programs.problems import CodeProblem
from unmask.tasks.programs.sandbox import run_programs
from unmask.tasks.programs.verdict import Outcome
from unmask.tasks.programs.worker import SandboxFailed

SECONDS = 3.0
"""CPU time of a solution and its tests."""
_USUAL = (1, 10, 100)


def judge_solutions(
    problems: Sequence[CodeProblem],
    completions: Sequence[str],
    *,
    seconds: float = SECONDS,
    update: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """Runs each completion, after its problem's head, with the problem's tests; the same one once only.

    The `reason` of an outcome is `correct`, or one of `verdict.REASONS`; all are `not_graded` if no sandbox can be
    started. `update` is called with how many are done.
    """
    asked = [(problem.name, completion) for problem, completion in zip(problems, completions, strict=True)]
    by_name = {problem.name: problem for problem in problems}
    unique = list(dict.fromkeys(asked))
    sources = [by_name[name].head + completion for name, completion in unique]
    known = len(asked) - len(unique)
    report = None if update is None else lambda done: update(known + done)
    try:
        exams = [by_name[name].exam for name, _ in unique]
        outcomes = run_programs(sources, exams=exams, seconds=seconds, update=report)
    except SandboxFailed as error:
        outcomes = [Outcome.not_graded(str(error), source) for source in sources]
    found = {
        key: Outcome("correct", outcome.value, outcome.output, outcome.program) if outcome.reason == "ran" else outcome
        for key, outcome in zip(unique, outcomes, strict=True)
    }
    return [found[key] for key in asked]


def pass_at_k(n: int, right: int, k: int) -> float:
    """Estimates the probability that at least one of k samples is right, without bias, from `right` of n samples.

    1 - C(n - right, k) / C(n, k): the share of the sets of k that hold a right one (2107.03374, eq. 1).

    Raises:
        ValueError: not 0 <= right <= n, or not 1 <= k <= n.
    """
    if not 0 <= right <= n or not 1 <= k <= n:
        raise ValueError(f"n={n}, right={right}, k={k}: needs 0 <= right <= n and 1 <= k <= n")
    return 1 - math.comb(n - right, k) / math.comb(n, k)


@dataclass(frozen=True)
class Sample:
    """A row of a file of samples."""

    row: dict[str, Any]
    problem: CodeProblem
    completion: str

    def with_outcome(self, outcome: Outcome) -> dict[str, Any]:
        """Returns the row with its verdict, and `passed` as HumanEval's own tool writes it."""
        passed = outcome.reason == "correct" if outcome.is_graded else None
        return self.row | {"passed": passed, "reason": outcome.reason, "output": outcome.output}


def read_samples(path: Path, problems: Mapping[str, CodeProblem]) -> list[Sample]:
    """Reads JSON lines `{"task_id": .., "completion": ..}`, several of a problem if need be.

    Raises:
        UserError: a line is not such an object, or names no problem; with file, line and field.
    """
    samples = []
    for where, row in files.read_json_lines(path):
        name, completion = row.get("task_id"), row.get("completion")
        if not isinstance(completion, str):
            raise UserError(f"{where}: needs the string `completion`: what the model wrote")
        if not isinstance(name, str | int) or str(name) not in problems:
            first = next(iter(problems))
            raise UserError(
                f"{where}: task_id={str(name)[:40]!r} is none of the {len(problems)} problems ({first}, ..)"
            )
        samples.append(Sample(row, problems[str(name)], completion))
    if not samples:
        raise UserError(f"{path}: holds no sample; each line is an object with `task_id` and `completion`")
    return samples


@dataclass(frozen=True)
class SamplesGrade:
    """The grade of a file of samples.

    Attributes:
        n: samples that were graded.
        correct: those of them that pass their tests.
        problems: problems that they answer; `missing` are the others, which count nowhere.
        pass_at: the mean of `pass_at_k` over the problems, by k.
        stderr: its standard error over the problems, by k; None for a single problem.
        intervals: Wilson's, 95 %, over the problems, by k: wide enough or wider, where they have several samples.
        interval: that of pass@1; None where a problem has several samples.
        reasons: counts of the samples that fail.
        not_graded: samples that the machine could not run; they count nowhere else.
    """

    n: int
    correct: int
    problems: int
    missing: int
    pass_at: dict[int, float]
    stderr: dict[int, float | None]
    intervals: dict[int, tuple[float, float]]
    interval: tuple[float, float] | None
    reasons: dict[str, int]
    not_graded: int

    def as_dict(self) -> dict[str, Any]:
        """Returns the grade as JSON."""
        by_k: dict[str, Mapping[int, Any]] = {"": self.pass_at, "_stderr": self.stderr, "_interval": self.intervals}
        own = {key: value for key, value in vars(self).items() if key not in ("pass_at", "stderr", "intervals")}
        return {f"pass@{k}{name}": value for name, values in by_k.items() for k, value in values.items()} | own


def grade_samples(
    samples: Sequence[Sample], outcomes: Sequence[Outcome], known: int, ks: Sequence[int] = ()
) -> SamplesGrade:
    """Sums up the samples of some of the `known` problems.

    Args:
        samples: the samples.
        outcomes: of `judge_solutions`.
        known: number of problems of the benchmark.
        ks: which pass@k; default: those of 1, 10, 100 for which all problems have samples enough.

    Raises:
        UserError: a problem has fewer samples than k.
    """
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for sample, outcome in zip(samples, outcomes, strict=True):
        if outcome.is_graded:
            verdicts[sample.problem.name].append(outcome.reason == "correct")
    reasons = Counter(outcome.reason for outcome in outcomes)
    correct, not_graded = reasons.pop("correct", 0), reasons.pop("not_graded", 0)
    fewest = min(map(len, verdicts.values()), default=0)
    for k in ks if verdicts else ():
        if k > fewest:
            name = next(name for name, own in verdicts.items() if len(own) == fewest)
            raise UserError(
                f"--k {k}: {name} has {fewest} graded samples; pass@{k} needs at least {k} of every problem"
            )
    shares = {
        k: [pass_at_k(len(own), sum(own), k) for own in verdicts.values()]
        for k in ks or [k for k in _USUAL if k <= fewest]
        if verdicts
    }
    is_single = bool(verdicts) and all(len(own) == 1 for own in verdicts.values())
    return SamplesGrade(
        n=sum(map(len, verdicts.values())),
        correct=correct,
        problems=len(verdicts),
        missing=known - len({sample.problem.name for sample in samples}),
        pass_at={k: math.fsum(own) / len(own) for k, own in shares.items()},
        stderr={k: _standard_error(own) for k, own in shares.items()},
        intervals={k: wilson(math.fsum(own), len(own)) for k, own in shares.items()},
        interval=wilson(correct, len(verdicts)) if is_single else None,
        reasons=dict(reasons.most_common()),
        not_graded=not_graded,
    )


def _standard_error(values: Sequence[float]) -> float | None:
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
