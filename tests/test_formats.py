"""Text, JSON and YAML from files that anybody may have made."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask import formats
from unmask.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("1e-3", 0.001),
        ("1.", 1.0),
        ("-.5", -0.5),
        ("true", True),
        ("~", None),
        ("yes", "yes"),
        ("12:30", "12:30"),
        ("1_000", 1000),
        ("1_000.5", 1000.5),
        ("1__0", "1__0"),
        ("08", 8),
        ("1e3", 1000.0),
        ("+.5", 0.5),
        ("'010'", "010"),
        ("0x_", "0x_"),
        ("1:00", "1:00"),
        ("0b1", "0b1"),
        ("on", "on"),
        ("=", "="),
        ("", None),
        ("a: &x {k: 1, l: 2}\nb: {<<: *x, k: 3}", {"a": {"k": 1, "l": 2}, "b": {"k": 3, "l": 2}}),
        ("2001-01-01", "2001-01-01"),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = formats.parse_yaml(text, "f")
    assert found == value
    assert type(found) is type(value)


NINE = ",".join(["*a{0}"] * 9)
BOMB = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{NINE.format(i - 1)}]\n" for i in range(1, 20))


DEEP = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 100))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("!!int abc", "tags are not read"),
        ("! 12", "tags are not read"),
        ("!!timestamp 2001-01-01", "tags are not read"),
        ("!!python/object/apply:os.getcwd []", "tags are not read"),
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' stands already in line 1"),
        ("x:\n  k: 1\n  'k': 2", "line 3: the key 'k' stands already in line 2"),
        ("- &c {k: 1}\n- &d {<<: *c, k: 2}\n- {<<: *d, k: 3, k: 4}", "line 3: the key 'k' stands already in line 3"),
        ("{a: " * 50_000, "nested more than 64 deep"),
        ("- " * 50_000, "nested more than 64 deep"),
        ("? " * 50_000, "nested more than 64 deep"),
        (DEEP, "nested more than 64 deep, with its aliases"),
        ("[" + "1," * 100_000 + "]", "more than 10,000 values"),
        ("[" * 50_000, "nested more than 64 deep"),
        ("5" * 5_000, "a number of 5,000 digits"),
        ("&a [*a]", r"the alias '\*a' stands within itself"),
        ("? [1]\n: 2", "no plain word"),
        (BOMB, "more than 10,000 values"),
        ("[", "line 1: not valid YAML"),
        ("a: 1\n--- b", "expected a single document"),
        ("a\0b", "not valid YAML"),
        ('"\\U99999999"', "not valid YAML"),
        ('"\\ud800"', "half of a surrogate pair"),
        ("%YAML " + "9" * 5_000 + ".1\n---\na", "not valid YAML"),
        ("*a", "undefined alias"),
    ],
)
def test_yaml_that_is_refused(text: str, error: str) -> None:
    with pytest.raises(UserError, match=f"^f(, line [0-9]+)?: .*{error}|^f, {error}") as found:
        formats.parse_yaml(text, "f")
    assert len(str(found.value)) < 300


PLAIN = (
    "010 08 1e3 1.5e3 +.5 0o17 0x1F 0b1 1_000 yes on NO 12:30 1:30.5 ~ null = 2001-01-01 << true .inf -.INF .nan"
    " - *a &a !a % @"
)
WORDS = st.sampled_from(
    [*PLAIN.split(), "2001-01-01 10:00:00", "", " ", "- a", "a: b", "# a", "a\nb", "\t", "é\u2028", "'", '"']
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8) | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60)
@given(VALUES)
def test_what_is_written_as_yaml_is_read_back(value: Any) -> None:
    assert repr(formats.parse_yaml(formats.to_yaml(value), "f")) == repr(value)
    assert repr(yaml.safe_load(formats.to_yaml(value))) == repr(value)
    # And what earlier versions have written:
    assert repr(formats.parse_yaml(yaml.safe_dump(value, sort_keys=False), "f", is_saved=True)) == repr(value)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "NaN", "1e999", "[-1e400]", '{"a": Infinity}', "1" * 5_000, '{"a":1', "nul"]
)
def test_json_that_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^f: is "):
        formats.parse_json(text, "f")


def test_numbers_that_are_not_finite_are_written_as_null() -> None:
    assert formats.to_json({"a": [float("nan"), (1.5, float("-inf"))]}) == '{"a": [null, [1.5, null]]}'


def test_a_field_of_another_type_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": {"b": "1"}}')
    with pytest.raises(UserError, match=r"a.json: a\.b: Input should be a valid integer \(found '1'\)"):
        formats.read_json(tmp_path / "a.json", dict[str, dict[str, int]])
    assert formats.read_json(tmp_path / "a.json", dict[str, dict[str, str]]) == {"a": {"b": "1"}}


def test_text_that_is_not_utf_8_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one\ntwo \xe9\n")
    with pytest.raises(UserError, match="a, line 2: byte 0xe9 is not UTF-8"):
        formats.read_text(tmp_path / "a")


def test_only_regular_files_of_a_sensible_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "long").write_text("12345")
    for name, error in (
        ("fifo", "no regular file"),
        ("long", "more than 4 bytes"),
        ("a\0b", "null"),
        ("none", "No such"),
    ):
        with pytest.raises(UserError, match=error):
            formats.read_text(tmp_path / name, max_bytes=4)
    with pytest.raises(UserError, match="no regular file"):
        formats.read_text(Path("/dev/zero"))


def test_what_steers_a_terminal_is_escaped() -> None:
    assert formats.printable("a\x1b[31m\tb\n\x9b\u202e é👩‍👧") == "a\\x1b[31m\tb\n\\x9b\\u202e é👩‍👧"
    assert formats.printable("\ud800") == "\\ud800"


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (None, "null"),
        (True, "true"),
        ("true", "'true'"),
        (1e-5, "1.0e-05"),
        ((1, 4), "[1, 4]"),
        ([{"name": "beta", "a": 2.0}], "[{name: beta, a: 2.0}]"),
        ("é" * 200, "é" * 200),
    ],
)
def test_a_value_in_one_line_is_read_as_the_same(value: Any, line: str) -> None:
    assert formats.to_yaml_line(value) == line
    assert formats.parse_yaml(line, "here") == (list(value) if isinstance(value, tuple) else value)
