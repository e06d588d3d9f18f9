"""The verb `unmask grade`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from unmask.cli import options
from unmask.errors import RunFailed, UserError
from unmask.formats import to_json
from unmask.progress import progress
from unmask.tasks.programs import grading as programs
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


def _grade_programs(path: Path) -> GradedFile:
    rows = programs.read_programs(path)
    with progress("Running", len(rows)) as update:
        judgements = programs.judge_rows(rows, update)
    grade = programs.grade(judgements)
    lines = [f"{grade.correct} of {grade.n} right"]
    if grade.interval is not None:
        low, high = grade.interval
        lines = [f"{lines[0]}: {grade.accuracy:.1%} (95% interval {low:.1%} to {high:.1%})"]
    failure = None
    if grade.not_graded:
        lines.append(f"{grade.not_graded} of {len(rows)} not graded: they could not be run")
        said = programs.say_not_graded([each.output for each in judgements if not each.is_graded], len(rows))
        failure = f"{said}; grade the file again when more of the machine is free"
    graded = [row.with_judgement(each) for row, each in zip(rows, judgements, strict=True)]
    return GradedFile(asdict(grade), lines, graded, failure)


def _grade_sudoku(path: Path) -> GradedFile:
    grade = sudoku.grade_file(path)
    lines = [
        f"{grade.correct} of {grade.n} right ({grade.correct / grade.n:.1%})",
        f"{grade.exact} of the {grade.n_unique} puzzles with one solution answered with it",
    ]
    return GradedFile(asdict(grade), lines, rows=[])


_GRADERS: dict[str, Callable[[Path], GradedFile]] = {"gsm8k": _grade_programs, "sudoku": _grade_sudoku}


def grade(
    file: Annotated[Path, typer.Argument(help="JSON lines, with the keys below.")],
    task: Annotated[str, typer.Option(help=f"Task that the answers are for: {', '.join(_GRADERS)}.")] = "gsm8k",
    out: Annotated[
        Path | None, typer.Option(help="New file for each row with its verdict (default: not written).")
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

    Examples:

    * `unmask grade programs.jsonl --out graded.jsonl`

    * `unmask grade --task sudoku answers.jsonl --json`
    """
    if task not in _GRADERS:
        raise UserError(f"--task {task}: no grader; use {', '.join(_GRADERS)}")
    if out is None:
        graded = _GRADERS[task](file)
    else:
        with options.new_file(out) as target:
            graded = _GRADERS[task](file)
            _write_rows(graded.rows, target)
    if as_json:
        options.print_json(graded.result)
    else:
        _print(graded)
    if graded.failure is not None:
        raise RunFailed(graded.failure)


def _write_rows(rows: list[dict[str, Any]], target: TextIO) -> None:
    if not rows:
        raise UserError("--out: this task's grader writes no rows; leave it out")
    for row in rows:
        target.write(to_json(row) + "\n")


def _print(graded: GradedFile) -> None:
    out = options.results()
    for line in graded.lines:
        out.print(line)
    for reason, count in graded.result["reasons"].items():
        out.print(f"  {reason}: {count}")
