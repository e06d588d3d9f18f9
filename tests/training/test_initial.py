"""Weights that a training starts from, of a run: `train.init`."""

from pathlib import Path

import pytest

from tests.helpers import SHORT, run_cli
from tests.helpers.runs import debug_run
from unmask.errors import UserError
from unmask.training import restoring


def test_a_wrong_start_leaves_no_folder(tmp_path: Path) -> None:
    debug_run(tmp_path / "other", "train.steps=2", "model.dim=16").train()
    assert run_cli("train", "debug", *SHORT, f"train.init={tmp_path / 'other'}", "--out", tmp_path / "run") == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["num_heads=4", "norm_eps=0.1", "rope_theta=100"])
def test_a_start_is_read_as_the_network_that_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    debug_run(tmp_path / "other", "train.steps=2", "model.rotary=true").train()
    start = (f"train.init={tmp_path / 'other'}", "model.rotary=true")
    assert run_cli("train", "debug", *SHORT, *start, f"model.{setting}", "--out", tmp_path / "run") == 2
    assert f"its model has model.{setting.partition('=')[0]}=" in capsys.readouterr().err
    assert run_cli("train", "debug", *SHORT, *start, "model.dropout=0.1", "--out", tmp_path / "run") == 0


@pytest.mark.parametrize(
    ("theirs", "ours", "is_taken"),
    [
        ("{layers: [0, 1], times: [1, 4]}", "null", False),
        ("{layers: [0, 1], times: 2}", "{layers: [1, 1], times: 2}", False),
        ("{layers: [0, 1], times: 2}", "{layers: [0, 1], times: [1, 3]}", True),
        ("null", "{layers: [0, 1], times: 2}", True),
    ],
)
def test_a_start_that_was_trained_in_loops_needs_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], theirs: str, ours: str, is_taken: bool
) -> None:
    debug_run(tmp_path / "other", "train.steps=2", "model.num_layers=2", f"model.loops={theirs}").train()
    given = (f"train.init={tmp_path / 'other'}", "model.num_layers=2", f"model.loops={ours}")
    assert run_cli("train", "debug", *SHORT, *given, "--out", tmp_path / "run") == (0 if is_taken else 2)
    said = f"its model has model.loops={theirs.replace('times: 2', 'times: [2, 2]')} (not "
    assert (said in " ".join(capsys.readouterr().err.split())) != is_taken


def test_a_start_may_have_another_value_of_what_has_no_effect(tmp_path: Path) -> None:
    debug_run(tmp_path / "other", "train.steps=2").train()  # no rotary positions
    debug_run(tmp_path / "run", f"train.init={tmp_path / 'other'}", "model.rope_theta=100", "train.steps=1").train()


def test_all_that_differs_from_a_start_is_said_at_once(tmp_path: Path) -> None:
    debug_run(tmp_path / "other", "train.steps=2").train()
    start, other = f"train.init={tmp_path / 'other'}", ["model.dim=16", "model.num_layers=1", "model.qk_norm=true"]
    with pytest.raises(UserError, match=r"model.dim=32 \(not 16\), .*layers=2 \(not 1\), .*norm=false \(not true\)"):
        debug_run(tmp_path / "run", start, *other).train()
    with pytest.raises(UserError, match=r"other tokens \(task.name=sudoku, 11 ids; here 9\); name a run of this"):
        debug_run(tmp_path / "run", start, "task.name=toy", "data={values: 8, length: 2}", *other).train()


def test_a_start_is_read_once_where_resume_finds_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    debug_run(tmp_path / "other", "train.steps=2").train()
    real, read = restoring.read_initial_weights, []
    monkeypatch.setattr(restoring, "read_initial_weights", lambda *asked: read.append(1) or real(*asked))
    debug_run(tmp_path / "run", "train.steps=2", f"train.init={tmp_path / 'other'}").train(resume=True)
    assert read == [1]
