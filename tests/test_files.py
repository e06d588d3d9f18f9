"""Files in a folder that somebody else has made: links are not followed, and missing locks and syncs are said."""

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unmask import files
from unmask.errors import UserError
from unmask.tensor_files import DTYPES


def refuse(number: int):  # type: ignore[no-untyped-def]
    def call(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def test_a_link_in_place_of_what_is_written_aside_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".writing_config.yaml").symlink_to(victim)
    files.write(tmp_path / "config.yaml", "new")
    assert victim.read_text() == "mine"
    assert (tmp_path / "config.yaml").read_text() == "new"


def test_a_new_file_is_never_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (tmp_path / "new").symlink_to(victim)
    with pytest.raises(FileExistsError):
        files.put(tmp_path / "new", "x")
    files.put_tensors(tmp_path / "new", {})
    assert not victim.exists()


def test_a_failed_write_leaves_nothing_and_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write(tmp_path / "a", "old")
    monkeypatch.setattr(files, "rename", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        files.write(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_what_died_processes_left_is_swept(tmp_path: Path) -> None:
    old, new, folder = (tmp_path / f".writing_{name}" for name in ("old", "new", "step_00000001"))
    old.write_text("half")
    os.utime(old, (0, 0))
    new.write_text("of a process that still writes")
    folder.mkdir()
    files.write(tmp_path / "a", "x")
    assert not old.exists()
    assert new.exists()
    files.sweep(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [".writing_step_00000001", "a"]


def test_tensors_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    """As any other file of an export: safetensors itself makes files for their owner alone."""
    files.put(tmp_path / "config.json", "{}")
    for _ in range(2):  # a new file, and one that is replaced
        files.put_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(2)})
        assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.zeros(2))


def test_removing_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    for name in ("link", "dangling", "file", "nothing"):
        files.remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_lock_changes_no_file_and_follows_no_link(tmp_path: Path) -> None:
    held, victim = tmp_path / "held", tmp_path / "victim"
    held.write_text("what it holds")
    victim.write_text("mine")
    with files.FileLock(held, wait=False):
        assert files.FileLock.is_held(held)
        with pytest.raises(BlockingIOError):
            files.FileLock(held, wait=False)
    assert not files.FileLock.is_held(held)
    assert held.read_text() == "what it holds"
    (tmp_path / "link").symlink_to(victim)
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo"):
        assert not files.FileLock.is_held(tmp_path / name)
        with pytest.raises(OSError, match=r"is (a link|no regular file)"):
            files.FileLock(tmp_path / name, wait=True)
    assert victim.read_text() == "mine"


def test_without_locks_the_work_goes_on_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    for _ in range(2):
        with files.FileLock(tmp_path / "lock", wait=False), files.exclusive(tmp_path / "data"):
            assert not files.FileLock.is_held(tmp_path / "lock")
    said = capsys.readouterr().err
    assert said.count("has no locks") == 1
    assert str(tmp_path) in said


def test_a_folder_that_cannot_be_synced_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write(tmp_path / "a", "1")
    files.write(tmp_path / "b", "2")
    assert capsys.readouterr().err.count("cannot be synced") == 1
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match=r"Input/output error: .*/c'$"):
        files.write(tmp_path / "c", "3")


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    """Not the file aside, which nobody has asked for and which is gone."""
    (tmp_path / "cache.npy" / "own").mkdir(parents=True)
    with pytest.raises(OSError, match="directory") as caught:
        files.write(tmp_path / "cache.npy", b"new")
    assert str(caught.value).endswith(f": '{tmp_path / 'cache.npy'}'")
    assert [path.name for path in tmp_path.iterdir()] == ["cache.npy"]


def test_tensors_are_written_as_safetensors_writes_them(tmp_path: Path) -> None:
    """Byte for byte, though one after the other: in every format, of every shape."""
    made = {f"{kind}.{i}": torch.ones(shape, dtype=dtype) for kind, dtype in DTYPES.items() for i, shape in SHAPES}
    made |= {"turned": torch.arange(6.0).reshape(2, 3).T, "ä": torch.arange(5)}
    for metadata in (None, {"format": "pt"}):
        files.put_tensors(tmp_path / "ours", made, metadata)
        save_file({name: each.contiguous() for name, each in made.items()}, tmp_path / "theirs", metadata)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    for name, value in load_file(tmp_path / "ours").items():
        assert torch.equal(value, made[name])


SHAPES = [*enumerate([(), (3,), (0, 2), (2, 3, 1)])]


def test_a_format_that_no_file_can_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"angles: is of torch\.complex128, which cannot be saved"):
        files.put_tensors(tmp_path / "model.safetensors", {"angles": torch.zeros(2, dtype=torch.complex128)})
