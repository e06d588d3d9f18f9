"""Reads numbers from answers, and compares them."""

import math
import re

from unmask.errors import UserError

_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")
_MARK = "####"
_MAX_LENGTH = 400

INTEGER_TOLERANCE = 1e-6
"""A number this close to an integer is taken as that integer."""
TOLERANCE = 1e-3
"""Largest absolute difference of equal numbers, where one is no integer."""


def parse_answer(text: str) -> float:
    """Parses the number of an answer: after the last `####` (as GSM8K writes it), without `,`, `$`, `%` and blanks.

    Raises:
        ValueError: it is not one finite number; the message shows it.
    """
    stated = text.rpartition(_MARK)[2].strip()
    digits = re.sub(r"[,$%\s]", "", stated[:_MAX_LENGTH])
    if len(stated) > _MAX_LENGTH or not _NUMBER.fullmatch(digits):
        raise ValueError(f"{stated[:40]!r} is not a number")
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{stated[:40]!r} is too large")
    return value


def read_answer(answer: object, where: str) -> float:
    """Reads the right answer in a row of a file: a number, or a text for `parse_answer`.

    Raises:
        UserError: it is neither; the message begins with `where`, its file and line.
    """
    if isinstance(answer, bool) or not isinstance(answer, int | float | str):
        raise UserError(f"{where}: needs `answer`: a number, or a text that ends in `#### 18`")
    try:
        return parse_answer(answer if isinstance(answer, str) else repr(answer))
    except ValueError as error:
        raise UserError(f"{where}: answer: {error}; use a number, or a text that ends in `#### 18`") from error


def matches(value: float | int, gold: float | int) -> bool:
    """True if `value` answers `gold`: integers (`INTEGER_TOLERANCE`) must be equal, others within `TOLERANCE`.

    Nothing matches nan or an infinity.
    """
    try:
        if not (math.isfinite(value) and math.isfinite(gold)):
            return False
        if all(abs(number - round(number)) <= INTEGER_TOLERANCE for number in (value, gold)):
            return round(value) == round(gold)
        return abs(value - gold) <= TOLERANCE
    except OverflowError:  # an int beyond all floats: it can only equal the same int
        return value == gold
