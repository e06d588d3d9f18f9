import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from unmask.errors import UserError
from unmask.training import checkpoint

STATE = {
    "model": {"a.weight": torch.randn(3, 4), "b": torch.tensor(2.0)},
    "ema": None,
    "process": {"step": 3, "pool": {"is_masked": torch.tensor([True, False]), "stage": torch.arange(2)}},
    "progress": {"step": 7, "best_step": None, "scores": [0.1, 0.2]},
}


def assert_same(one: object, other: object) -> None:
    if isinstance(one, dict):
        assert isinstance(other, dict)
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


def test_state_comes_back_as_it_was(tmp_path: Path) -> None:
    assert_same(checkpoint.load(checkpoint.save(tmp_path, 7, STATE)), STATE)


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


def test_a_write_that_fails_anywhere_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every sync and rename in turn is made to fail; what is there before and after is whole."""
    older = checkpoint.save(tmp_path, 5, STATE)
    calls, fail_at = [0], [0]

    def failing(function):  # type: ignore[no-untyped-def]
        def call(*arguments, **options):  # type: ignore[no-untyped-def]
            calls[0] += 1
            if calls[0] == fail_at[0]:
                raise OSError(28, "No space left on device")
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(Path, "rename", failing(Path.rename))
    monkeypatch.setattr(Path, "write_text", failing(Path.write_text))
    monkeypatch.setattr(checkpoint, "save_file", failing(checkpoint.save_file))
    failures = 0
    for fail_at[0] in range(1, 100):
        calls[0] = 0
        try:
            checkpoint.save(tmp_path, 7, STATE)
        except OSError:
            failures += 1
            found = checkpoint.newest(tmp_path, lambda message: None)
            assert found is not None
            assert_same(checkpoint.load(found), STATE)
            assert found in (older, tmp_path / "step_00000007")
        else:
            break
    assert failures >= 10
    assert checkpoint.newest(tmp_path, pytest.fail) == tmp_path / "step_00000007"


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


def test_checksums_cover_every_other_file(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, STATE)
    listed = set(json.loads((path / "COMPLETE").read_text()))
    assert listed == {file.name for file in path.iterdir()} - {"COMPLETE"}
