"""`unmask grade`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from unmask.cli import options
from unmask.errors import UserError
from unmask.tasks.sudoku.grading import grade_file

_GRADERS = {"sudoku": grade_file}


def grade(
    file: Annotated[
        Path, typer.Argument(help="JSON lines with the strings `puzzle` and `answer`.", show_default=False)
    ],
    task: Annotated[str, typer.Option(help=f"What the answers are to: {', '.join(_GRADERS)}.", show_default=False)],
    as_json: options.AsJson = False,
) -> None:
    """Grade anyone's answers.

    A Sudoku answer is right if every given of its puzzle is kept and all rows, columns and boxes hold. Wrong ones are
    counted by reason. `exact` counts the puzzles with exactly one solution that were answered with it.

    Example: `unmask grade --task sudoku answers.jsonl --json`
    """
    if task not in _GRADERS:
        raise UserError(f"--task {task}: no grader; use {', '.join(_GRADERS)}")
    result = _GRADERS[task](file)
    if as_json:
        options.print_json(asdict(result))
        return
    out = options.results()
    out.print(f"{result.correct} of {result.n} right ({result.correct / result.n:.1%})")
    out.print(f"{result.exact} of the {result.n_unique} puzzles with one solution answered with it")
    for reason, count in result.reasons.items():
        out.print(f"  {reason}: {count}")
