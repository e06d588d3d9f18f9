import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch

from tests.helpers import assert_same
from unmask import files
from unmask.errors import UserError
from unmask.training import checkpoint

STATE = {
    "model": {"a.weight": torch.randn(3, 4), "b": torch.tensor(2.0)},
    "ema": None,
    "process": {"step": 3, "pool": {"is_masked": torch.tensor([True, False]), "stage": torch.arange(2)}},
    "progress": {"step": 7, "best_step": None, "scores": [0.1, 0.2]},
}


def test_state_comes_back_as_it_was(tmp_path: Path) -> None:
    assert_same(checkpoint.load(checkpoint.save(tmp_path, 7, STATE)), STATE)


def test_a_step_that_is_saved_again_is_never_without_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each rename in turn, the next process finds the old one or the new one."""
    for dies_at in (1, 2, 3):
        folder = tmp_path / str(dies_at)
        checkpoint.save(folder, 7, STATE)
        renames = [0]

        def rename(source: Path, target: Path, renames: list[int] = renames, dies_at: int = dies_at) -> None:
            renames[0] += 1
            if renames[0] == dies_at:
                raise KeyboardInterrupt
            source.replace(target)

        new = {**STATE, "progress": {"step": 7, "best_step": 7}}
        with monkeypatch.context() as patch:
            patch.setattr(files, "rename", rename)
            try:
                checkpoint.save(folder, 7, new)
                assert dies_at == 3
            except KeyboardInterrupt:
                assert dies_at < 3
        checkpoint.put_in_place(folder)
        checkpoint.set_aside(folder, after=7)
        assert [path.name for path in folder.iterdir()] == ["step_00000007"]
        assert checkpoint.damage(folder / "step_00000007") is None
        assert checkpoint.load(folder / "step_00000007")["progress"]["best_step"] == (None if dies_at == 1 else 7)


def test_other_folders_are_no_checkpoints(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 7, STATE)
    for name in ("step_00000009_backup", "step_00000009_1", "step_9", "step_"):
        (tmp_path / name).mkdir()
    assert checkpoint.steps(tmp_path) == [7]


def test_there_is_no_pickle(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 7, STATE)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json", ""}
    for file in path.iterdir():
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever pickle says of what is none
            pickle.loads(file.read_bytes())


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "process.safetensors", "COMPLETE"])
@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path: Path, name: str, harm: str) -> None:
    older = checkpoint.save(tmp_path, 5, STATE)
    path = checkpoint.save(tmp_path, 7, STATE)
    file = path / name
    content = bytearray(file.read_bytes())
    if harm == "missing":
        file.unlink()
    elif harm == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    warnings: list[str] = []
    assert checkpoint.newest(tmp_path, warnings.append) == older
    assert len(warnings) == 1
    assert "step_00000007" in warnings[0]


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "COMPLETE", "model.pt", ".metadata"])
def test_a_pickle_that_someone_put_there_does_not_run(name: str, tmp_path: Path) -> None:
    older = checkpoint.save(tmp_path, 5, STATE)
    path = checkpoint.save(tmp_path, 7, STATE)
    bomb = pickle.dumps(Touch(tmp_path / "it_ran"))
    (path / name).write_bytes(bomb)
    if name != "COMPLETE":  # even with a checksum that matches
        listed = json.loads((path / "COMPLETE").read_text()) | {name: hashlib.sha256(bomb).hexdigest()}
        (path / "COMPLETE").write_text(json.dumps(listed))
    warnings: list[str] = []
    found = checkpoint.newest(tmp_path, warnings.append)
    assert found == (path if name in ("model.pt", ".metadata") else older)
    assert all("step_00000007" in warning for warning in warnings)
    assert_same(checkpoint.load(found), STATE)
    assert not (tmp_path / "it_ran").exists()
    pickle.loads(bomb)
    assert (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("text", ["{}", "5", '{"COMPLETE": "0"}', "[" * 100_000])
def test_a_list_of_files_that_is_none(text: str, tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 7, STATE)
    (path / "COMPLETE").write_text(text)
    assert checkpoint.newest(tmp_path, lambda message: None) is None


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.newest(tmp_path, pytest.fail)


def test_a_snapshot_does_not_change_any_more() -> None:
    state = {"a": torch.zeros(3), "b": {"c": [1], "d": torch.ones(2)}}
    taken = checkpoint.snapshot(state)
    state["a"] += 1
    state["b"]["d"].zero_()
    state["b"]["c"].append(2)
    assert_same(taken, {"a": torch.zeros(3), "b": {"c": [1], "d": torch.ones(2)}})


def test_prune_keeps_the_newest_the_best_and_the_multiples(tmp_path: Path) -> None:
    for step in range(10, 101, 10):
        checkpoint.save(tmp_path, step, {"progress": {"step": step}})
    checkpoint.prune(tmp_path, keep_last=2, keep_every=40, keep={30})
    assert checkpoint.steps(tmp_path) == [30, 40, 80, 90, 100]


def test_find_last_best_and_a_step(tmp_path: Path) -> None:
    for step, best in ((10, None), (20, 10), (30, 10)):
        checkpoint.save(tmp_path / "checkpoints", step, {"progress": {"step": step, "best_step": best}})
    found = {which: checkpoint.find(tmp_path, which, pytest.fail).name[-2:] for which in ("last", "best", "20")}
    assert found == {"last": "30", "best": "10", "20": "20"}
    with pytest.raises(UserError, match="there are 10, 20, 30"):
        checkpoint.find(tmp_path, "15", pytest.fail)
    with pytest.raises(UserError, match="use a number, `last` or `best`"):
        checkpoint.find(tmp_path, "newest", pytest.fail)
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.find(tmp_path / "elsewhere", "last", pytest.fail)


def test_find_reads_no_checkpoint_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint.save(tmp_path / "checkpoints", 10, {"progress": {"step": 10, "best_step": 10}})
    read: list[Path] = []
    monkeypatch.setattr(checkpoint, "damage", lambda own: read.append(own))
    for which in ("last", "best", "10"):
        assert checkpoint.find(tmp_path, which, pytest.fail) == path
    assert read == [path] * 3


def test_checksums_cover_every_other_file(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, STATE)
    listed = set(json.loads((path / "COMPLETE").read_text()))
    assert listed == {file.name for file in path.iterdir()} - {"COMPLETE"}
