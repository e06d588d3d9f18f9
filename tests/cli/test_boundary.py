"""Whatever happens, the command line ends with a line in words and an exit code."""

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from rich.table import Table
from rich.text import Text

from tests.helpers import run_cli
from tests.helpers.sudoku import EASY
from unmask.config import recipes
from unmask.errors import Interrupted
from unmask.progress import TextConsole, console
from unmask.training.logging import StepDisplay

FAILURES = {
    "a bug": (TypeError("one\ntwo"), 1, "internal error: TypeError: one two; --traceback shows where"),
    "a disk": (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1, "a/b: No space left on device"),
    "a disk without a name": (OSError(errno.EIO, "Input/output error"), 1, "Input/output error; --traceback"),
    "memory": (MemoryError(), 1, "the memory is full: out of memory"),
    "a GPU's memory": (
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        1,
        "the memory is full: CUDA out of memory;",
    ),
    "a CPU's memory": (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), 1, "the memory is full"),
    "depth": (RecursionError("maximum recursion depth exceeded"), 1, "nested too deeply"),
    "an end of file": (EOFError("Compressed file ended"), 1, "internal error: EOFError: Compressed file ended"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "Interrupted"),
    "a signal": (Interrupted("stopped; go on with --resume"), 130, "stopped; go on with --resume"),
    "nobody reads": (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
}


@pytest.mark.parametrize(("error", "code", "words"), FAILURES.values(), ids=FAILURES.keys())
def test_what_nobody_has_foreseen_is_one_line(
    error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipes, "load", Mock(side_effect=error))  # raised by a library, not by code of the user's
    assert run_cli("settings", "debug") == code
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.removeprefix("\nAborted.\n").count("\n") == (1 if words else 0)  # typer's word for an end of file
    assert run_cli("settings", "--traceback", "debug") == code
    assert ("Traceback" in capsys.readouterr().err) == bool(words)


LATE = """
import importlib.abc, os, signal, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Finder())
from unmask.cli import run
run()
"""


def test_a_signal_during_the_imports_is_heard() -> None:
    done = subprocess.run([sys.executable, "-c", LATE, "settings"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "Interrupted by SIGTERM\n")


GROUP = """
import torch.distributed
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
"""


@pytest.mark.parametrize("before", ["", GROUP])
def test_in_a_group_that_was_not_left_nothing_waits_for_the_end(before: str) -> None:
    hooked = before + "import atexit; from unmask.cli import run; atexit.register(print, 'hook'); run()"
    done = subprocess.run([sys.executable, "-c", hooked, "nothing"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "" if before else "hook\n"), done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_any_verb_whatever_libraries_catch(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def swallow(*arguments: Any) -> None:
        try:
            signal.raise_signal(number)
        except Exception:
            pytest.fail("a library's `except Exception` has caught the signal")

    before = signal.getsignal(number)
    monkeypatch.setattr(recipes, "load", swallow)
    assert run_cli("settings", "debug") == 130
    assert capsys.readouterr().err == f"Interrupted by {number.name}\n"
    assert signal.getsignal(number) == before


def test_nohup_keeps_its_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        load = recipes.load
        monkeypatch.setattr(recipes, "load", lambda *a: signal.raise_signal(signal.SIGHUP) or load(*a))
        assert run_cli("settings", "debug", "train.steps") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def open_full_disk() -> io.TextIOWrapper:
    file = io.TextIOWrapper(Path("/dev/full").open("wb", buffering=0), write_through=True)  # noqa: SIM115
    file.mode = "w"  # as `open` leaves it: a part of a TextIO
    return file


def test_a_full_disk_behind_stdout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["settings", "debug", "train"], ["settings", "debug", "--json"], ["train", "--help"]):
        with open_full_disk() as full, monkeypatch.context() as patch:
            patch.setattr("sys.stdout", full)
            assert run_cli(*arguments) == 1
        assert capsys.readouterr().err == "Error: stdout: No space left on device\n"


@pytest.mark.parametrize("state", ["closed", "full"])
def test_a_result_that_cannot_be_written_is_an_error(
    state: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever prints a result, exits with 1 and one line; what has none to print takes no harm."""
    (tmp_path / "x.txt").write_text(EASY)
    (tmp_path / "x.jsonl").write_text(f'{{"puzzle": "{EASY}", "answer": "{EASY}"}}\n')
    verbs = [
        ["--version"],
        ["--help"],
        ["settings", "debug"],
        ["eval", run, "--decoder", "prob,tokens_per_step=40", "--examples", 1, "--json"],
        ["decode", run, tmp_path / "x.txt", "--decoder", "prob,tokens_per_step=40"],
        ["grade", tmp_path / "x.jsonl", "--task", "sudoku"],
        ["diagnose", run, "--only", "nll", "--examples", 2, "--draws", 1, "--json"],
    ]
    for number, arguments in enumerate([*verbs, ["export", run, tmp_path / "model"]]):
        with open_full_disk() as full, monkeypatch.context() as patch:
            patch.setattr("sys.stdout", None if state == "closed" else full)
            code = run_cli(*arguments)
        told = capsys.readouterr().err.splitlines()
        assert code == (number < len(verbs)), (arguments, told)
        reason = "is closed, so the result is lost" if state == "closed" else "No space left on device"
        assert len([line for line in told if line.startswith(f"Error: stdout: {reason}")]) == code, (arguments, told)


def test_a_reader_that_leaves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    end, start = os.pipe()
    os.close(end)
    with monkeypatch.context() as patch:
        pipe = os.fdopen(start, "w")
        patch.setattr("sys.stdout", pipe)
        assert run_cli("settings", "debug") == 141
        pipe.detach().raw.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_cannot_print_a_sign(
    encoding: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr("unmask.cli.settings._table", lambda rows: "0.5 ± 0.1 ─ 数")
    assert run_cli("settings", "debug") == 0
    assert run_cli("train", "--help") == 0
    stream.flush()
    assert b"0.5 " in stream.buffer.getvalue()


def test_what_could_steer_a_terminal_is_escaped_in_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["a\u202eb\x1b[2J"],
        ["settings", "debug", "--a\u202eb"],
        ["bench", "a\u202eb"],
        ["export", "--step"],
    ):
        assert run_cli(*arguments) == 2
        said = capsys.readouterr().err
        assert not {"\u202e", "\x1b"} & set(said)
        assert r"a\u202eb" in said or arguments[-1] == "--step"
    assert run_cli() == 2  # says what there is


def test_messages_that_nobody_takes_end_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_full_disk() as full, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", full)
        console.print("lost")


def test_what_could_steer_a_terminal_is_escaped() -> None:
    out = io.StringIO()
    bad = "a\x1b[2J\x9b\u202eb\ud800"
    table = Table(title=bad)
    table.add_column(bad)
    table.add_row(bad)
    for each in (bad, Text(bad), table):
        TextConsole(out).print(each)
    shown = out.getvalue()
    assert shown.count("\\x1b[2J\\x9b\\u202eb\\ud800") == 5
    assert "\x1b" not in shown


def test_names_are_text_and_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = TextConsole(out := io.StringIO())
    shown._force_terminal = shown.is_interactive = True
    monkeypatch.setattr("unmask.training.logging.console", shown)
    with StepDisplay("x[/y]/m[v2].yaml", 0, 4) as display:
        display.step(1, 0.1)
        display._bar.refresh()
    assert "x[/y]/m[v2].yaml" in out.getvalue()


def test_an_argument_that_is_not_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("train", "debug", "--out", os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")) == 2
    assert "caf\\xe9': an argument that is not UTF-8" in capsys.readouterr().err


def test_bytes_and_halves_of_characters_are_refused_with_their_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("decode", "chat"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{EASY}\n".encode() + b"caf\xe9\n")))
        assert run_cli(verb, run) == 2
        assert "stdin, line 2: byte 0xe9 is not UTF-8" in capsys.readouterr().err
    (tmp_path / "x.jsonl").write_text('{"program": "", "answer": 1}\n{"program": "\\ud800", "answer": 1}\n')
    assert run_cli("grade", tmp_path / "x.jsonl") == 2
    assert "x.jsonl, line 2: not JSON: \\ud800 is half of a character" in capsys.readouterr().err


def test_messages_to_a_closed_stream_lead_nowhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert run_cli("settings", "debug", "train.steps") == 0
    assert "train.steps" in capsys.readouterr().out
    assert run_cli("settings", "nothing") == 2
