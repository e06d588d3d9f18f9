"""Numbers are read as GSM8K writes them, and compared as people would."""

import math

import pytest

from unmask.tasks.programs.answers import matches, parse_answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("She has 3 + 4 = <<3+4=7>>7.\n#### 7", 7),
        ("#### 3\n#### 1,234,567", 1234567),
        ("#### $-12.50", -12.5),
        ("####50%\n", 50),
        ("-$5", -5),
        ("18.", 18),
        (".5", 0.5),
        ("1e3", 1000),
        ("72.0", 72),
    ],
)
def test_parse_answer(text: str, value: float) -> None:
    assert parse_answer(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "####", "#### many", "1/2", "3 apples", "nan", "inf", "1e999", "9" * 400, "9" * 10**6, "١٨", "1_000", "--1"],
)
def test_no_answer(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a number|is too large"):
        parse_answer(text)


@pytest.mark.parametrize(
    ("value", "gold", "is_match"),
    [
        (18, 18.0, True),
        (18.0000004, 18, True),
        (17.9999996, 18, True),
        (18.0, 19.0, False),
        (1_000_000_001.0, 1_000_000_000.0, False),  # a relative tolerance would forgive this
        (0.3333, 1 / 3, True),
        (0.334, 1 / 3, True),
        (0.335, 1 / 3, False),
        (2.5005, 2.5, True),
        (-3, 3, False),
        (0, -0.0, True),
        (math.nan, math.nan, False),
        (math.inf, math.inf, False),
        (10**400, 1.5, False),
        (10**400, 10**400, True),
        (10**400, 10**400 + 1, False),
        (1e300, 1.5, False),
    ],
)
def test_matches(value: float | int, gold: float | int, is_match: bool) -> None:
    assert matches(value, gold) is is_match
    assert matches(gold, value) is is_match
