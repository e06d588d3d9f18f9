"""A preparation that is killed, stopped or refused: the same command goes on, and makes the same bytes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.prepared import contents, expected_texts, texts
from tests.helpers.text import byte_level, rows, save_tokenizer, settings, write_lines
from unmask.data.prepare import prepare, run, workers, writing
from unmask.data.prepare.settings import PrepareSettings
from unmask.errors import RunFailed, UserError


class _Killed(BaseException):
    """As a signal would."""


@pytest.mark.parametrize("vocab", ["full", "used"])
@pytest.mark.parametrize("last", [0, 3, 6])
def test_killed_and_called_again_it_makes_the_same_bytes(
    last: int, vocab: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(settings(tmp_path, "whole", vocab=vocab))
    saved: list[str] = []

    def save(path: Path, shard: writing.Shard) -> None:
        if path.stem == f"{last:08d}":
            raise _Killed
        saved.append(path.stem)
        real(path, shard)

    real = writing.save
    monkeypatch.setattr(writing, "save", save)
    with pytest.raises(_Killed):
        prepare(settings(tmp_path, vocab=vocab))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(writing, "save", lambda path, shard: (saved.append(path.stem), real(path, shard)))
    prepare(settings(tmp_path, vocab=vocab))
    assert saved == [f"{number:08d}" for number in range(7)]  # each once
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("place", ["write_store", "_publish"])
def test_killed_at_the_end_it_makes_the_same_bytes(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(settings(tmp_path, "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(run, place, lambda *arguments: (_ for _ in ()).throw(_Killed))
        with pytest.raises(_Killed):
            prepare(settings(tmp_path))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.partial" / "store").mkdir(exist_ok=True)
    (tmp_path / "out.partial" / "store" / "labels.bin").write_bytes(b"half")
    prepare(settings(tmp_path))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def arguments(asked: PrepareSettings) -> list[str]:
    sources = [str(source) for source in asked.sources]
    options = {"tokenizer": asked.tokenizer, "out": asked.out, "length": asked.length, "workers": asked.workers}
    return ["prepare", "tinygsm", *sources, *(f"--{key}={value}" for key, value in options.items())]


HELD_UP = """
import itertools, time
from unmask.cli import run
from unmask.data.prepare import workers

submit, number = workers._submit, itertools.count()

def hold_up(*arguments):
    if next(number) == 3:
        time.sleep(600)
    return submit(*arguments)

workers._submit = hold_up
run()
"""
"""The command `unmask`, which after three batches waits: it cannot be done before the signal comes."""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_ends_all_processes_and_the_work_goes_on(number: int, code: int, tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", rows(100) * 40)
    asked = settings(tmp_path, workers=2, batch_rows=1000)
    process = subprocess.Popen([sys.executable, "-c", HELD_UP, *arguments(asked)], stderr=subprocess.PIPE, text=True)
    partial = tmp_path / "out.partial" / "shards"
    while process.poll() is None and not list(partial.glob("*.npz")):
        time.sleep(0.01)
    process.send_signal(number)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert "Traceback" not in message
    if number == signal.SIGINT:
        assert f"The same command goes on; what is done is in {tmp_path / 'out.partial'}" in message
    assert 0 < len(list(partial.glob("*.npz"))) < 4
    assert not (tmp_path / "out").exists()
    prepare(asked)
    prepare(settings(tmp_path, "whole", batch_rows=1000))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def stop_early(monkeypatch: pytest.MonkeyPatch, asked: PrepareSettings) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_store", lambda *arguments: (_ for _ in ()).throw(_Killed))
        with pytest.raises(_Killed):
            prepare(asked)


CHANGED: dict[str, dict[str, Any]] = {
    "length": {"length": 64},
    "too_long": {"too_long": "drop"},
    "vocab": {"vocab": "used"},
    "separator": {"separator": "\t"},
    "limit": {"limit": 3},
    "fields": {"prompt_field": "code"},
    "mask_token": {"mask_token": "<|im_end|>"},
}


@pytest.mark.parametrize(("key", "changed"), CHANGED.items(), ids=CHANGED.keys())
def test_other_settings_do_not_go_on(
    key: str, changed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_early(monkeypatch, settings(tmp_path))
    with pytest.raises(UserError) as caught:
        prepare(settings(tmp_path, **changed))
    assert f"{tmp_path / 'out.partial'}: holds an unfinished preparation with other settings: " in str(caught.value)
    assert f"{key} (" in str(caught.value)
    assert "delete it, or use another --out" in str(caught.value)
    prepare(settings(tmp_path, workers=2, skip_bad=True))


def test_a_changed_source_or_tokenizer_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_early(monkeypatch, settings(tmp_path))
    write_lines(tmp_path / "rows.jsonl", rows(49))
    with pytest.raises(UserError, match=r"other settings: sources \("):
        prepare(settings(tmp_path))
    write_lines(tmp_path / "rows.jsonl", rows(50))
    save_tokenizer(tmp_path / "tokenizer", byte_level(None))
    with pytest.raises(UserError, match=r"other settings: tokenizer \("):
        prepare(settings(tmp_path))


def test_a_damaged_shard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_early(monkeypatch, settings(tmp_path))
    shard = tmp_path / "out.partial" / "shards" / "00000002.npz"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match=r"00000002\.npz: cannot be read.*delete it, and it is made again"):
        prepare(settings(tmp_path))
    shard.unlink()
    prepare(settings(tmp_path))
    assert texts(tmp_path / "out") == expected_texts(rows(50))


def test_only_one_process_works_in_a_folder(tmp_path: Path) -> None:
    asked = settings(tmp_path)
    with run.WorkFolder(asked.partial, {}), pytest.raises(UserError, match=r"out\.partial: another process works here"):
        prepare(asked)


@pytest.mark.parametrize("is_file", [True, False])
def test_what_exists_is_not_touched(is_file: bool, tmp_path: Path) -> None:
    if is_file:
        (tmp_path / "out").write_text("precious")
    else:
        (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"--out .*out: exists already; delete it, or name another folder"):
        prepare(settings(tmp_path))
    assert not (tmp_path / "out.partial").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match=r"file/out\.partial: cannot be written"):
        prepare(settings(tmp_path, "file/out"))


def test_a_full_disk_is_named_and_the_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, shard: writing.Shard) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "save", full)
        with pytest.raises(RunFailed, match=r"out\.partial: cannot be written: .*No space left.*same command goes on"):
            prepare(settings(tmp_path))
    prepare(settings(tmp_path))


def die(*arguments: object) -> None:
    os._exit(1)


def test_a_dead_worker_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_make", die)
    with pytest.raises(UserError, match=r"--workers 2: a process was killed.*with fewer --workers too"):
        prepare(settings(tmp_path, workers=2))
