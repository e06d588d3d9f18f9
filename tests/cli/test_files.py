"""Names, folders and files that users give: what cannot be is said in a line, and nothing is left half made."""

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import lines, run_cli
from tests.helpers.sudoku import EASY
from unmask import files, paths
from unmask.cli import options
from unmask.cli.session import DecodeSession
from unmask.errors import Interrupted, UserError


def raising(error: BaseException) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        raise error

    return call


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


def test_a_current_folder_that_is_gone_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run_cli("settings", "debug") == 1
    assert capsys.readouterr().err == "Error: the current folder is gone; change to one that exists\n"
