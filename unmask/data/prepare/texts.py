"""The texts in the rows of a source, and what is wrong with a row."""

from collections.abc import Sequence
from typing import Any

from unmask.data.prepare.sources import Row
from unmask.data.vocabulary import Vocabulary


class _Bad(Exception):
    """Why a row cannot be used."""


def read_texts(rows: Sequence[Row], fields: tuple[str, ...]) -> tuple[dict[int, tuple[str, ...]], dict[int, str]]:
    """By their place in `rows`: the texts of `fields` of those that have them, what is wrong with the others."""
    texts, problems = {}, {}
    for i, row in enumerate(rows):
        try:
            texts[i] = _texts(row, fields)
        except _Bad as problem:
            problems[i] = str(problem)
    return texts, problems


def _texts(row: Row, fields: tuple[str, ...]) -> tuple[str, ...]:
    try:
        content = row.fields
    except ValueError as error:
        raise _Bad(str(error)) from error
    return tuple(_text(content, field) for field in fields)


def _text(content: dict[str, Any], field: str) -> str:
    if field not in content:
        raise _Bad(
            f"has no field {field!r}, but {', '.join(content) or 'none'} "
            "(name it: --prompt-field, --answer-field; of text, --text-field or data.field)"
        )
    value = content[field]
    if not isinstance(value, str):
        raise _Bad(f"field {field!r} is {str(value)[:40]}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Bad(f"field {field!r} is no text: {error}") from error
    return value


def special_token(ids: Sequence[int], vocabulary: Vocabulary) -> str | None:
    """What is wrong with a row in which the mask or the end stands as text."""
    for name, option, token in (("mask", "--mask-token", vocabulary.mask_id), ("end", "--eos", vocabulary.eos_id)):
        if token in ids:
            return f"holds the {name} token {vocabulary.name(token)!r} (choose another: {option})"
    return None
