"""Whatever happens, the command line ends with a line in words and an exit code, and leaves nothing half made."""

import errno
import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from rich.table import Table
from rich.text import Text

from tests.helpers import lines, run_cli
from tests.helpers.sudoku import EASY
from unmask import files, paths
from unmask.cli import options
from unmask.cli.session import DecodeSession
from unmask.config import recipes
from unmask.errors import Interrupted, UserError
from unmask.progress import TextConsole, console
from unmask.training.logging import StepDisplay


def raising(error: BaseException) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        raise error

    return call


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


NOBODY = "~nosuchuser/x"
HOMELESS = {
    "data.path": (["train", "debug", f"data.path={NOBODY}.csv"], f"data.path={NOBODY}.csv"),
    "train.init": (["train", "debug", f"train.init={NOBODY}"], NOBODY),
    "data.cache_dir": (["train", "debug", f"data.cache_dir={NOBODY}"], f"data.cache_dir={NOBODY}"),
    "train --out": (["train", "debug", "--out", NOBODY], f"--out {NOBODY}"),
    "recipe": (["train", f"{NOBODY}.yaml"], f"recipe {NOBODY}.yaml"),
    "text": (["train", "text/uniform_small", f"data.path={NOBODY}"], f"data.path={NOBODY}"),
    "store": (["train", "tinygsm/uniform_small", f"data.path={NOBODY}"], NOBODY),
    "decode": (["decode", NOBODY], NOBODY),
    "eval": (["eval", NOBODY], NOBODY),
    "chat": (["chat", NOBODY], NOBODY),
    "settings": (["settings", NOBODY], NOBODY),
    "diagnose": (["diagnose", NOBODY], NOBODY),
    "report": (["report", NOBODY], NOBODY),
    "report --out": (["report", "run", "--out", NOBODY], f"--out {NOBODY}"),
    "compare --out": (["compare", "debug", "sudoku/uniform", "--out", NOBODY], f"--out {NOBODY}"),
    "export": (["export", NOBODY, "x"], NOBODY),
    "export to": (["export", "run", NOBODY], NOBODY),
    "grade": (["grade", NOBODY], NOBODY),
    "prepare": (["prepare", "text", f"{NOBODY}.txt", "--tokenizer", "bytes", "--out", "o"], f"{NOBODY}.txt"),
    "prepare --out": (["prepare", "text", "--tokenizer", "bytes", "--out", NOBODY], f"--out {NOBODY}"),
    "tokenizer": (["prepare", "text", "--tokenizer", NOBODY, "--out", "o"], f"tokenizer {NOBODY}"),
}


@pytest.mark.parametrize(("arguments", "place"), HOMELESS.values(), ids=HOMELESS.keys())
def test_a_home_that_nobody_has(
    arguments: list[str],
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli(*arguments) == 2
    printed = capsys.readouterr().err
    assert f"{place}: whose home folder is that?" in " ".join(printed.split())
    assert not [*tmp_path.iterdir()]


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "UNMASK_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", raising(KeyError("uid")))
    with pytest.raises(UserError, match=r"the cache is to be in ~/\.cache/unmask: whose home folder"):
        files.cache_folder()


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800"])
def test_names_that_no_file_can_have(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"^--out .*: (no file can have|cannot be read: File name too long)"):
        paths.user_path(name, "--out ")
    if name.isprintable():
        assert run_cli("grade", name) == 2
        assert run_cli("eval", name) == 2
        assert run_cli("train", f"{name}.yaml") == 2


def test_what_is_no_file_is_not_opened(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path, kind in (
            (tmp_path / "fifo", "fifo"),
            (tmp_path / "socket", "socket"),
            (Path("/dev/zero"), "device"),
            (tmp_path, "folder"),
        ):
            verbs = [["decode", run, path], ["grade", path], ["train", "debug", f"data.path={path}"]]
            for arguments in verbs if path == tmp_path else [*verbs, ["eval", run, "--data", path]]:
                assert run_cli(*arguments) == 2
                assert f"{path}: cannot be read: is a {kind}; name a file" in capsys.readouterr().err
    with pytest.raises(UserError, match="no such folder; name a folder"):
        paths.existing_folder(tmp_path / "nowhere")


def test_a_pipe_that_is_open_already_is_read(run: Path, tmp_path: Path) -> None:
    end, start = os.pipe()
    os.write(start, EASY.encode())
    os.close(start)
    decoder = "prob,tokens_per_step=40"
    assert run_cli("decode", run, f"/dev/fd/{end}", "--decoder", decoder, "--out", tmp_path / "out.jsonl") == 0
    os.close(end)
    assert lines(tmp_path / "out.jsonl")[0]["puzzle"] == EASY
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def full(*arguments: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def write_half(path: Path, error: BaseException) -> None:
    with options.new_file(path) as file:
        file.write("half")
        file.flush()
        raise error


def test_a_file_of_out_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    for error in (OSError(errno.ENOSPC, "No space left on device"), Interrupted()):
        with pytest.raises(type(error), match=r"No space left.*out|^$"):
            write_half(out, error)
        assert not [*out.parent.iterdir()]
    with options.new_file(out) as file:
        file.write("whole")
        assert not out.exists()
    assert out.read_text() == "whole"
    for taken in (out, Path(), Path("/")):
        with pytest.raises(UserError, match="exists already; name another file"):
            write_half(taken, Interrupted())


def test_decoding_onto_a_full_disk_keeps_what_was_done(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decode, number = DecodeSession.decode, iter(range(9))
    monkeypatch.setattr(DecodeSession, "decode", lambda *a: decode(*a) if next(number) < 1 else full())
    (tmp_path / "x.txt").write_text(f"{EASY}\n" * 3)
    decoder = "prob,batch_size=1,tokens_per_step=40"
    assert run_cli("decode", run, tmp_path / "x.txt", "--decoder", decoder, "--out", tmp_path / "out") == 1
    assert "out.part: No space left on device\n" in capsys.readouterr().err
    assert len(lines(tmp_path / "out.part")) == 1
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert run_cli("decode", run, tmp_path / "x.txt", "--decoder", decoder, "--out", tmp_path / "out") == 0
    assert len(lines(tmp_path / "out")) == 3


@pytest.mark.parametrize("operation", ["put", "put_tensors", "sync", "rename"])
def test_an_export_onto_a_full_disk_leaves_nothing(
    operation: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files, operation, full)
        assert run_cli("export", run, tmp_path / "model") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
    (tmp_path / "model").mkdir()
    assert run_cli("export", run, tmp_path / "model") == 0
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "model").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_may_not_be_read_is_not_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = os.open

    def refuse_folders(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse_folders)
    for content in ("one", "two"):
        files.write(tmp_path / "file", content)
    assert (tmp_path / "file").read_text() == "two"
    assert capsys.readouterr().err.count("cannot be synced (Permission denied)") == 1


def test_messages_to_a_closed_stream_lead_nowhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert run_cli("settings", "debug", "train.steps") == 0
    assert "train.steps" in capsys.readouterr().out
    assert run_cli("settings", "nothing") == 2


def test_a_current_folder_that_is_gone_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run_cli("settings", "debug") == 1
    assert capsys.readouterr().err == "Error: the current folder is gone; change to one that exists\n"
