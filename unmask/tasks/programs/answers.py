"""Reads numbers from answers, and compares them: right answers, and what programs return, by the same rules."""

import math
import re

from unmask.errors import UserError

_NUMBER = re.compile(
    r"(?P<sign>[-+]?)(?P<currency>\$ ?)?(?P<inner_sign>[-+]?)"
    r"(?P<digits>(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
    r"(?P<exponent>[eE][-+]?[0-9]{1,3})?(?P<percent> ?%)?"
)
_MARK = "####"
_MAX_LENGTH = 400

INTEGER_TOLERANCE = 1e-6
"""A number this close to an integer is taken as that integer."""
TOLERANCE = 1e-3
"""Largest absolute difference of equal numbers, where one is no integer."""


def parse_answer(text: str) -> float | int:
    """Parses the one number of an answer: all of it, or all after the last `####` (as GSM8K writes it).

    It may have a sign, a `$` before it, thousands `1,234` in groups of three, decimals, an exponent, and a `%` after
    it; `50%` is 50. Nothing else counts as one number: neither `5, 10` and `1 8` nor `1,5` and `1.234,56`. An integer
    that a float cannot hold is an int.

    Raises:
        ValueError: it is not one finite number; the message shows it.
    """
    stated = text.rpartition(_MARK)[2].strip()
    found = _NUMBER.fullmatch(stated) if len(stated) <= _MAX_LENGTH else None
    is_one = found is not None and not (
        (found["sign"] and found["inner_sign"])
        or (found["inner_sign"] and not found["currency"])
        or (found["currency"] and found["percent"])
        or ("," in found["digits"] and found["exponent"])
    )
    if found is None or not is_one:
        raise ValueError(f"{stated[:40]!r} is not a number")
    sign, digits = found["sign"] or found["inner_sign"], found["digits"].replace(",", "")
    if digits.isdigit() and not found["exponent"]:
        return read_number(int(sign + digits))
    return read_number(float(sign + digits + (found["exponent"] or "")))


def read_number(value: object) -> float | int:
    """Reads a finite number from a value of Python or JSON: a number, or a text for `parse_answer`; a bool is none.

    Raises:
        ValueError: it is not that; the message shows it.
    """
    if isinstance(value, str):
        return parse_answer(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{str(value)[:40]!r} is not a number")
    try:
        rounded = float(value)
    except OverflowError:
        raise ValueError(f"an integer of {int(value).bit_length()} bits is too large") from None
    if not math.isfinite(rounded):
        raise ValueError(f"'{rounded}' is not a number" if math.isnan(rounded) else f"'{rounded}' is too large")
    return rounded if rounded == value else value


def read_answer(answer: object, where: str) -> float | int:
    """Reads the right answer in a row of a file.

    Raises:
        UserError: it is not one number; the message begins with `where`, its file and line.
    """
    if isinstance(answer, bool) or not isinstance(answer, int | float | str):
        raise UserError(f"{where}: needs `answer`: a number, or a text that ends in `#### 18`")
    try:
        return read_number(answer)
    except ValueError as error:
        raise UserError(
            f"{where}: answer: {error}; use a number, such as -1,234.5, or a text that ends in `#### 18`"
        ) from error


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
