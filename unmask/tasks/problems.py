"""Word problems in files: questions with the number that answers them."""

from dataclasses import dataclass
from pathlib import Path

from unmask.data.prepare.sources import File, Row
from unmask.errors import UserError
from unmask.tasks.programs.answers import read_answer


@dataclass(frozen=True)
class Problem:
    question: str
    answer: float


def read_problems(path: Path) -> list[Problem]:
    """The problems in a .jsonl, .jsonl.gz or .parquet file: the string `question`, and `answer`, a number or a text.

    Of a text, what stands after the last `####` counts, as GSM8K writes it.

    Raises:
        UserError: the file cannot be read, or a row is not a problem, with its line.
    """
    problems = [_problem(row) for row in File(str(path)).rows(("question", "answer"))]
    if not problems:
        raise UserError(f"{path}: holds no problem; each line is an object with `question` and `answer`")
    return problems


def _problem(row: Row) -> Problem:
    try:
        content = row.fields
    except ValueError as error:
        raise UserError(f"{row.place}: {error}") from error
    if not isinstance(content.get("question"), str):
        raise UserError(f"{row.place}: needs the string `question`")
    return Problem(content["question"], read_answer(content.get("answer"), row.place))
