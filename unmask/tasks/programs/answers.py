"""Numbers: read from an answer, held against each other."""

import math
import re

from unmask.errors import UserError

_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")
_MARK = "####"
_MAX_LENGTH = 400

WHOLE = 1e-6
"""A number this close to a whole one is meant as that one."""
CLOSE = 1e-3
"""The absolute difference that is forgiven where a number is not whole."""


def parse_answer(text: str) -> float:
    """The number that an answer states: after the last `####` (as GSM8K writes it), without `,`, `$`, `%` and blanks.

    Raises:
        ValueError: it is not one finite number, with what it is.
    """
    said = text.rpartition(_MARK)[2].strip()
    digits = re.sub(r"[,$%\s]", "", said[:_MAX_LENGTH])
    if len(said) > _MAX_LENGTH or not _NUMBER.fullmatch(digits):
        raise ValueError(f"{said[:40]!r} is not a number")
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{said[:40]!r} is too large")
    return value


def read_answer(answer: object, where: str) -> float:
    """The right answer in a row of a file: a number, or a text for `parse_answer`.

    Raises:
        UserError: it is neither; `where` says where it stands.
    """
    if isinstance(answer, bool) or not isinstance(answer, int | float | str):
        raise UserError(f"{where}: needs `answer`: a number, or a text that ends in `#### 18`")
    try:
        return parse_answer(answer if isinstance(answer, str) else repr(answer))
    except ValueError as error:
        raise UserError(f"{where}: answer: {error}; use a number, or a text that ends in `#### 18`") from error


def matches(value: float | int, gold: float | int) -> bool:
    """Whether `value` answers `gold`: two whole numbers (within `WHOLE`) must be the same, others within `CLOSE`.

    Nothing matches nan or an infinity.
    """
    try:
        if not (math.isfinite(value) and math.isfinite(gold)):
            return False
        if _is_whole(value) and _is_whole(gold):
            return round(value) == round(gold)
        return abs(value - gold) <= CLOSE
    except OverflowError:  # an int beyond all floats: it can only equal the same int
        return value == gold


def _is_whole(value: float | int) -> bool:
    return abs(value - round(value)) <= WHOLE
