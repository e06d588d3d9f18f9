"""Every verb and every setting, fed from a grammar of bad values: no traceback, no hang, nothing taken in silence."""

import io
import json
import os
import random
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.helpers import SHORT, run_cli
from tests.helpers.sudoku import EASY
from unmask.cli.app import app
from unmask.cli.settings import explain
from unmask.config import recipes
from unmask.lab import trainings

REFUSED = object()
"""No setting may be this."""
BOMB = "[&a0 [1], " + ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20)) + "]"
TEXTS = [
    "yes",
    "0x_",
    "12:30",
    "2001-99-99",
    "x" * 300,
    "~nosuchuser/x",
    "a]b[/red]",
    "../..",
    "nowhere.at:All",
    "os:getcwd",
]
TEXTS += [":", "/dev/zero", "\u202ex", "٣", "1e", "0b1", "--", "a.b"]
NO_VALUES = [".nan", ".inf", "-.inf", "1e999", "5" * 5000, "-" + "5" * 5000, "!!int abc", "!!timestamp x"]
NO_VALUES += [
    "!!python/name:os.system",
    "! 1",
    "[1",
    "{a: 1, a: 2}",
    "[" * 50_000,
    "{a: " * 50_000,
    "- " * 50_000,
    BOMB,
]
NO_VALUES += ["&a [*a]", "*a", "%", "@x", "a: b: c", "a\0b", "\x1b[31m", '"\\ud800"', '"\\U99999999"', "--- 1\n--- 2"]
VALUES: dict[str, Any] = {  # what is written: what it means in YAML 1.2
    **dict.fromkeys(["", "~", "null"]),
    **{word: word for word in TEXTS},
    **dict.fromkeys(NO_VALUES, REFUSED),
    **{str(number): number for number in (10**12, 2**31, 2**62, 2**63 - 1, 2**200, -(2**63), -1, 0)},
    **{str(number): number for number in (1.5, -0.0, 16.0, 1e30, 1e308, 5e-324)},
    "true": True,
    "1_000": 1000,
    "010": 10,
    "'1'": "1",
    "[]": [],
    "{}": {},
    "[1, true]": [1, True],
    "[[1]]": [[1]],
    "{a: 1}": {"a": 1},
    "[1e30]": [1e30],
    "{name: 3}": {"name": 3},
    "[~]": [None],
    "[1, {a: [3]}]": [1, {"a": [3]}],
}
TRUTH = {"yes", "true", "0", "1", "-0.0", "'1'"}
"""What a setting that is true or false takes, beside `false`."""
RECIPES = [
    "debug",
    "sudoku/ar",
    "text/uniform_small",
    "tinygsm/uniform_small",
    "tinygsm/puma_variable_small",
    "addition/puma",
]
SECONDS = 20
"""Of this process's CPU, for one command; or 15 times that on the clock."""


class Hung(BaseException):
    """A command has run for too long."""


class DidNothing:
    """Stands for the process of a training of `compare`."""

    returncode = 0

    def poll(self) -> int:
        return 0


@pytest.fixture
def places(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Paths by name: `RUN`, `NEW` and so on; what is no file, under its kind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(trainings.Training, "start", lambda *arguments: DidNothing())
    (tmp_path / "puzzles.txt").write_text(f"{EASY}\n")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "1 + 1?", "code": "def f():\n    return 2"}) + "\n")
    (tmp_path / "empty").write_text("")
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as held:
        held.bind("socket")
        yield {"RUN": str(run), "NEW": str(tmp_path / "new"), "PUZZLES": "puzzles.txt", "ROWS": "rows.jsonl"}


def outcome(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Returns exit code, results and messages of a command that must not hang."""

    def stop(number: int, frame: object) -> None:
        raise Hung(f"{number}: {arguments}")

    signals = [(signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, 15 * SECONDS)]
    before = [signal.signal(number, stop) for number, _, _ in signals]
    for _, timer, seconds in signals:
        signal.setitimer(timer, seconds)
    try:
        code = run_cli(*arguments)
    finally:
        for (number, timer, _), handler in zip(signals, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
    printed = capsys.readouterr()
    shown = " ".join(word[:60] for word in arguments)
    for word in ("Traceback", "internal error"):
        assert word not in printed.err, f"{shown}\n{printed.err[-1500:]}"
    assert code in (0, 1, 2), shown
    assert code == 0 or len(printed.err) > 10, f"{shown}: failed without a word"
    return code, printed.out, printed.err


def is_same(found: Any, meant: Any, text: str) -> bool:
    """True if a setting that is shown as `found` is what was written, and nothing guessed from it."""
    if isinstance(found, bool):
        return text in TRUTH
    if isinstance(found, list) and not isinstance(meant, list):
        return all(is_same(each, meant, text) for each in found)  # one number for both ends of a range
    if isinstance(found, float):
        return type(meant) in (int, float) and found == float(meant)
    return type(found) is type(meant) and bool(found == meant)


def keys_of(recipe: str) -> list[str]:
    return [key for key, _, _ in explain(recipes.load(recipe))]


SETTINGS = [(recipe, key, text) for recipe in RECIPES for key in keys_of(recipe) for text in VALUES]


def check_setting(recipe: str, key: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, said = outcome(["settings", recipe, f"{key}={text}", "--json"], capsys)
    shown = f"{recipe} {key}={text[:60]}"
    if code:
        assert code == 2, shown
        assert key.split(".")[0] in said, f"{shown}: the error names no setting:\n{said}"
        return
    assert VALUES[text] is not REFUSED, f"{shown}: taken"
    settings = {name: row["value"] for name, row in json.loads(out).items()}
    default = text == "" or VALUES[text] is None  # a section that is null has its defaults
    assert default or key not in settings or is_same(settings[key], VALUES[text], text), (
        f"{shown}: is {settings[key]!r}"
    )


def test_no_setting_is_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    for case in random.Random(0).sample(SETTINGS, 250):
        check_setting(*case, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_setting_is_guessed_at_large(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    for case in SETTINGS:
        if case[0] == recipe:
            check_setting(*case, capsys)


LARGE = [str(10**12), str(2**31), str(2**62), str(2**63 - 1), "1e308", "5e-324", "1e12", "1", "0"]
PATHS = [
    "/dev/zero",
    "fifo",
    "socket",
    ".",
    "/",
    "empty",
    "x" * 300,
    "~nosuchuser/x",
    "nowhere",
    "\u202ex",
    "a]b[/red]",
]
TRAININGS = [(key, text) for key in keys_of("debug") for text in (*LARGE, *PATHS) if key != "train.timeout"]
ONE_STEP = [
    *SHORT,
    "train.max_examples=1",
    "train.compile=false",
    "eval.examples=2",
    "data.puzzles=32",
    "model.num_layers=1",
]


def check_training(key: str, text: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    new = Path(places["NEW"])
    settings = [each for each in ONE_STEP if not each.startswith(f"{key}=")]
    outcome(["train", "debug", *settings, f"{key}={text}", "--out", str(new)], capsys)
    if new.exists():
        new.rename(new.with_name(f"done {len([*new.parent.iterdir()])}"))


def test_no_training_fails_raw(places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    for case in random.Random(1).sample(TRAININGS, 25):
        check_training(*case, places, capsys)


@pytest.mark.slow
def test_no_training_fails_raw_at_large(places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    for case in TRAININGS:
        check_training(*case, places, capsys)


@pytest.mark.parametrize(
    "setting",
    [
        "data.puzzles",
        "eval.nelbo_draws",
        "model.num_layers",
        "train.threads",
        "train.batch_size",
        "model.dim",
        "data.seed",
    ],
)
@pytest.mark.parametrize("text", [str(10**12), str(2**63), "1e30", "true"])
def test_no_cost_is_paid_that_nobody_can_pay(
    setting: str, text: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = outcome(["train", "debug", f"{setting}={text}", "--out", places["NEW"], *ONE_STEP[:4]], capsys)
    assert code == 2 or (setting, text) == ("data.seed", str(10**12))
    assert setting in said or code == 0
    assert code == 0 or not Path(places["NEW"]).exists()


BASES = {
    "prepare": ["tinygsm", "ROWS", "--tokenizer", "bytes", "--length", "64", "--workers", "1", "--out", "NEW"],
    "train": ["debug", *ONE_STEP, "--out", "NEW"],
    "settings": ["debug", "train"],
    "eval": ["RUN", "--examples", "2"],
    "decode": ["RUN", "PUZZLES"],
    "chat": ["RUN"],
    "diagnose": ["RUN", "--examples", "2", "--draws", "1", "--only", "nll"],
    "report": ["RUN", "--out", "NEW", "--examples", "1"],
    "grade": ["PUZZLES", "--task", "sudoku"],
    "export": ["RUN", "NEW"],
    "compare": ["debug", "sudoku/ar", *ONE_STEP, "--seeds", "1", "--measure", "eval/nelbo", "--out", "NEW"],
    "bench step": ["debug", *ONE_STEP, "--count", "1"],
    "bench decode": ["debug", *ONE_STEP, "--rows", "1"],
}
"""A command of each verb that works; but that `compare` misses its trainings, which take what `train` takes."""
WORDS = [
    *PATHS,
    "",
    "-1",
    "0",
    "1.5",
    "1e30",
    "true",
    str(10**12),
    str(2**63),
    "5" * 5000,
    "nan",
    "-",
    "=",
    ",",
    "[" * 50_000,
]
WORDS += [
    "a=b",
    "prob,prob",
    "prob,steps=!!int 3",
    "steps=1e30",
    "seed=12:30",
    "\x1b[31m",
    "a\0b",
    "\n",
    "é" * 200,
    "--help=",
]
WORDS += [
    "a" + ".a" * 50_000 + "=1",
    "train=[" + "[" * 50_000,
    "{",
    "%s",
    "debug",
    "os:getcwd",
    "," * 50_000,
    "/etc/passwd/x",
]


def options_of(verb: str) -> list[str]:
    command: Any = typer.main.get_command(app)
    for name in verb.split():
        command = command.commands[name]
    named = [max(each.opts, key=len) for each in command.params if each.opts[0].startswith("-")]
    flags = {max(each.opts, key=len) for each in command.params if getattr(each, "is_flag", False)}
    return [name for name in named if name not in flags and name != "--help"]


COMMANDS = [
    *((verb, option, word) for verb in BASES for option in options_of(verb) for word in WORDS),
    *((verb, place, word) for verb in BASES for place in range(2) for word in WORDS if not word.startswith("--")),
]


def check_command(
    verb: str, where: str | int, word: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    base = [places.get(each, each) for each in BASES[verb]]
    if isinstance(where, int):
        base[where : where + 1] = [word] if where < len(base) else []
    elif where in base:
        base[base.index(where) + 1] = word
    else:
        base += [where, word]
    outcome([*verb.split(), *base], capsys)
    new = Path(places["NEW"])
    if new.exists():
        new.rename(new.with_name(f"done {len([*new.parent.iterdir()])}"))


def test_no_verb_fails_raw(places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    for case in random.Random(2).sample(COMMANDS, 100):
        check_command(*case, places, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("verb", BASES)
def test_no_verb_fails_raw_at_large(verb: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    for case in COMMANDS:
        if case[0] == verb:
            check_command(*case, places, capsys)
