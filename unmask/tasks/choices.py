"""Multiple choice: questions whose choices are compared by their likelihood."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.data.prepare.sources import FileSource
from unmask.errors import UserError

_CONTEXTS = ("question", "context", "ctx")
_CHOICES = ("choices", "endings")
_ANSWERS = ("answer", "label", "expected_index")


@dataclass(frozen=True)
class Question:
    """A question of multiple choice.

    Attributes:
        context: what stands before each choice.
        choices: what may stand there, each as it is written after the context: a space comes first.
        answer: number of the right choice, from 0.
        place: file and line that it was read from, for messages.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    place: str


def read_questions(path: Path) -> list[Question]:
    """Reads a .jsonl, .jsonl.gz or .parquet file of questions.

    A row has `question`, which becomes "Question: ..\\nAnswer:", or `context`, which is used as it is; `choices`, a
    list of strings; and `answer`, the number of the right one from 0, or its text. HellaSwag's names are known as well:
    `ctx`, `endings`, `label`.

    Raises:
        UserError: the file cannot be read, or a row (named) is no such question.
    """
    questions = []
    for row in FileSource(str(path)).rows(()):
        try:
            questions.append(_read(row.fields, row.place))
        except ValueError as error:
            raise UserError(f"{row.place}: {error}") from error
    if not questions:
        raise UserError(f"{path}: holds no question; each line is an object with `question`, `choices` and `answer`")
    return questions


def _read(row: dict[str, Any], place: str) -> Question:
    key, text = _only(row, _CONTEXTS)
    _, choices = _only(row, _CHOICES)
    name, answer = _only(row, _ANSWERS)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"needs the string `{key}`: what is asked")
    is_list = isinstance(choices, list) and len(choices) > 1
    if not is_list or not all(isinstance(each, str) and each.strip() for each in choices):
        raise ValueError("needs `choices`: a list of two strings or more, none of them empty")
    choices = [each.strip() for each in choices]
    number = _number(answer.strip() if isinstance(answer, str) else answer, choices, name)
    if choices.count(choices[number]) > 1:
        raise ValueError(f"`choices` has the right one, {choices[number][:40]!r}, twice; leave one out")
    context = f"Question: {text.strip()}\nAnswer:" if key == "question" else text.rstrip()
    return Question(context, tuple(f" {each}" for each in choices), number, place)


def _only(row: dict[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    found = [(name, row[name]) for name in names if row.get(name) is not None]
    if len(found) > 1:
        raise ValueError(f"has `{found[0][0]}` and `{found[1][0]}`, which are the same; leave one out")
    return found[0] if found else (names[0], None)


def _number(answer: Any, choices: list[str], name: str) -> int:
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, str) and answer.isdecimal() and len(answer) < 4:  # as HellaSwag writes it
        answer = int(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        shown = str(answer)[:40]
        raise ValueError(f"{name}={shown!r}: must be the number of a choice, 0 to {len(choices) - 1}, or its text")
    return answer
