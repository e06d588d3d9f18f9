"""Numbers are read as GSM8K writes them, and compared as people would."""

import json
import math
from pathlib import Path

import pytest

from unmask.errors import UserError
from unmask.tasks.programs.answers import matches, parse_answer, read_answer, read_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("She has 3 + 4 = <<3+4=7>>7.\n#### 7", 7),
        ("#### 3\n#### 1,234,567", 1234567),
        ("#### $-12.50", -12.5),
        ("####50%\n", 50),
        ("-$5", -5),
        ("+$5", 5),
        ("$ 1,234.50", 1234.5),
        ("12 %", 12),
        ("-.5%", -0.5),
        ("007", 7),
        ("-1,234,567.", -1234567),
        ("1e-3", 0.001),
        ("18.", 18),
        (".5", 0.5),
        ("1e3", 1000),
        ("72.0", 72),
    ],
)
def test_parse_answer(text: str, value: float) -> None:
    assert parse_answer(text) == value


NO_NUMBERS = (
    *("", "####", "#### many", "1/2", "3 apples", "nan", "inf", "1e999", "9" * 400, "9" * 10**6, "1_000", "--1"),
    *("5, 10", "5,10", "1,5", "1, 8", "1 8", "1 234", "1.234,56", "1,23", "1,2345", "1234,567", "0,123", ",5", "5,"),
    *(
        "1,,234",
        "1.5.2",
        "2%1",
        "%5",
        "5%%",
        "5$",
        "$$5",
        "$5%",
        "-$-5",
        "+-1",
        "- 5",
        "$",
        "%",
        "-",
        ".",
        "1 e3",
        "1e 3",
    ),
    *("1,234e2", "1e1000", "١٨", "１８", "−5", "1\u00a08", "1\n8", "0x12", "18 # 3", "#### 5 ### 6", "1e3.5"),
)


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_no_answer(text: str) -> None:
    """Two numbers are never read as one, and no digit is left out. Digits are ASCII's."""
    with pytest.raises(ValueError, match=r"is not a number|is too large"):
        parse_answer(text)
    with pytest.raises(UserError, match=r"^rows, line 3: answer: "):
        read_answer(f"so it is\n#### {text}", "rows, line 3")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, True, None, [1], 1j])
def test_no_number(value: object) -> None:
    with pytest.raises(ValueError, match=r"is not a number|is too large"):
        read_number(value)
    with pytest.raises(UserError, match=r"^rows, line 3: "):
        read_answer(value, "rows, line 3")


def test_integers_are_exact() -> None:
    """Beyond 2^53 as well, where floats are not."""
    with pytest.raises(ValueError, match="an integer of 16610 bits is too large"):
        read_number(-(10**5000))
    large = 2**53 + 1
    assert read_number(large) == parse_answer(f"{large:,}") == large
    assert not matches(read_number(large), read_number(large - 1))
    assert type(read_number(18)) is type(parse_answer("18")) is float


@pytest.mark.parametrize(("name", "count"), [("test", 1319), ("train", 7473)])
def test_all_answers_of_gsm8k_are_numbers(gsm8k: Path, name: str, count: int) -> None:
    texts = [json.loads(line)["answer"] for line in (gsm8k / f"{name}.jsonl").read_text().splitlines()]
    values = [read_answer(text, name) for text in texts]
    assert values == [int(text.rpartition("####")[2].replace(",", "")) for text in texts]
    assert len(values) == count


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
