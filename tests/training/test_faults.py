"""A disk that fails at any moment: what is lost is the steps since the newest checkpoint, and they come back alike."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import assert_same, metrics_of
from tests.helpers.runs import tiny_run
from unmask import files
from unmask.config.run import TrainConfig
from unmask.errors import RunFailed
from unmask.peers import ALONE, Peers
from unmask.training import checkpoint, folder
from unmask.training.run import Run
from unmask.training.saving import Saver
from unmask.training.state import Progress

OPERATIONS = ("put", "put_tensors", "append", "sync", "rename", "make_folder", "remove")
LAST = 2


class Killed(BaseException):
    """The process is no more: nothing catches it."""


class Disk:
    """Stands before the operations of `files`: the one numbered `fail_at` (from 1) goes wrong as `fault` says."""

    def __init__(self, fault: str, fail_at: int) -> None:
        self.fault, self.fail_at = fault, fail_at
        self.done: list[str] = []
        self.is_dead = False
        self.synced: dict[Path, int] = {}
        """How much of each file would survive a power cut."""

    def wrap(self, name: str, operate: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if self.is_dead:
                raise Killed
            self.done.append(name)
            if len(self.done) == self.fail_at:
                self._fail(name, operate, arguments)
            result = operate(*arguments)
            self._note(name, *arguments)
            return result

        return call

    def _fail(self, name: str, operate: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if self.fault == "denied":
            raise PermissionError(errno.EACCES, "Permission denied")
        self._half(name, operate, arguments)
        if self.fault == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        self.is_dead = True
        if self.fault == "power cut":
            for path, length in self.synced.items():
                if path.exists():
                    os.truncate(path, length)
        raise Killed

    def _half(self, name: str, operate: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        target, *rest = arguments
        if name == "append":
            target.write(rest[0][: len(rest[0]) // 2])
        elif name in ("put", "put_tensors"):
            operate(*arguments)
            os.truncate(target, target.stat().st_size // 2)
            self.synced[target] = 0
        elif name == "remove" and target.exists():
            next(iter(target.iterdir())).unlink()

    def _note(self, name: str, *arguments: Any) -> None:
        target = Path(arguments[0].name) if name == "append" else arguments[0]
        if name in ("put", "put_tensors"):
            self.synced[target] = 0
        elif name == "append":
            self.synced.setdefault(target, 0)
        elif name == "sync" and target.is_file():
            self.synced[target] = target.stat().st_size
        elif name == "rename":
            self._renamed(target, arguments[1])

    def _renamed(self, source: Path, target: Path) -> None:
        for path in [*self.synced]:
            if path == source or source in path.parents:
                self.synced[target / path.relative_to(source)] = self.synced.pop(path)


def do_now(saver: Saver, work: Callable[[], object]) -> None:
    """In place of a thread, so that the n-th operation is always the same one."""
    saver._do(work)


def evaluate(run: Run) -> bool:
    """A cheap one, never the best."""
    run._log({"eval/nelbo": 1.0})
    run.progress.evaluated_step = run.progress.step
    return False


@pytest.fixture(scope="module", autouse=True)
def _fast() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(folder, "_git_revision", lambda: None)
        patch.setattr(Run, "_evaluate", evaluate)
        yield


def state(out: Path) -> dict:
    found = checkpoint.load(out / "checkpoints" / f"step_{LAST:08d}")
    for key in ("seconds", "metrics_position"):
        del found["progress"][key]
    return found


def train_on(disk: Disk, run: Run) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "_start", do_now)
        for name in OPERATIONS:
            patch.setattr(files, name, disk.wrap(name, getattr(files, name)))
        run.train()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    tiny_run(out).train()
    return out


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a run does to the disk, in order."""
    disk = Disk("none", fail_at=0)
    train_on(disk, tiny_run(tmp_path_factory.mktemp("counted") / "run"))
    return disk.done


def test_every_kind_of_operation_occurs(operations: list[str]) -> None:
    assert set(operations) == set(OPERATIONS)
    assert operations.count("rename") >= 2 + 2 + 1  # configuration and environment, two checkpoints, one pruned
    assert len(operations) > 50


@pytest.mark.parametrize(
    "fault",
    ["full", "power cut", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("denied", "killed"))],
)
def test_a_fault_at_any_operation_loses_nothing(
    fault: str, whole: Path, operations: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for fail_at in range(1, len(operations) + 1):
        out = tmp_path / str(fail_at)
        run = tiny_run(out)
        with pytest.raises(Killed if fault in ("killed", "power cut") else RunFailed):
            train_on(Disk(fault, fail_at), run)
        newest = checkpoint.newest(out / "checkpoints", lambda message: None)
        told = run.saver.whole_step if hasattr(run, "saver") else None
        assert told in (None, 1, 2)
        assert (0 if newest is None else checkpoint.step_of(newest)) >= (told or 0)
        written = [path for path in out.glob("checkpoints/.writing_step_*") if checkpoint.damage(path) is None]
        capsys.readouterr()
        tiny_run(out).train(resume=True)
        said = capsys.readouterr().err
        assert ("from step" in said) == (newest is not None or bool(written))  # whole, if not renamed yet
        assert_same(state(out), state(whole))
        assert metrics_of(out) == metrics_of(whole)
        assert not [path for path in out.rglob(".*ing_*") if path.is_dir()]


def test_a_full_disk_stops_the_run_and_says_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, main = files.put_tensors, threading.main_thread()

    def full_at_the_second(path: Path, tensors: dict) -> None:
        assert threading.current_thread() is not main
        if "step_00000002" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, tensors)

    out = tmp_path / "run"
    monkeypatch.setattr(files, "put_tensors", full_at_the_second)
    with pytest.raises(RunFailed, match=r"No space left.*newest checkpoint is of step 1.*continue with --resume"):
        tiny_run(out).train()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000001"]  # no half one takes the room


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state that is written is that of its step, whatever the next ones have changed."""
    real, run = (
        checkpoint.save,
        tiny_run(tmp_path / "run", "train.keep_last=9", "train.steps=4", "train.checkpoint_every=2"),
    )
    seen: list[int] = []

    def slow(path: Path, step: int, values: dict, peers: Peers) -> Path:
        while step == 2 and run.progress.step < 3:
            threading.Event().wait(0.001)
        seen.append(run.progress.step)
        return real(path, step, values, peers)

    monkeypatch.setattr(checkpoint, "save", slow)
    run.train()
    assert seen[0] >= 3
    monkeypatch.setattr(checkpoint, "save", real)
    plain = tiny_run(tmp_path / "plain", "train.keep_last=9", "train.steps=4", "train.checkpoint_every=2")
    monkeypatch.setattr(Saver, "_start", do_now)
    plain.train()
    for step in (2, 4):
        ours, theirs = (
            checkpoint.load(tmp_path / name / "checkpoints" / f"step_{step:08d}") for name in ("run", "plain")
        )
        assert_same(ours["model"], theirs["model"])
        assert_same(ours["optimizer"], theirs["optimizer"])
        assert_same(ours["process"], theirs["process"])


def test_an_error_of_the_thread_is_raised_once_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no")

    monkeypatch.setattr(checkpoint, "save", fail)
    saver = Saver(tmp_path, TrainConfig(steps=1), ALONE)
    saver.save({}, Progress(passes=0.0), None)
    saver.join()
    with pytest.raises(ValueError, match="no"):
        saver.check()
    saver.wait()
