"""What a run leaves behind, whatever happens to it."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers import assert_same, lines, metrics_of, run_cli
from tests.helpers.runs import TWELVE_STEPS, debug_run
from unmask import files
from unmask.config import recipes
from unmask.errors import RunFailed, UserError
from unmask.training import checkpoint, evaluating, restoring
from unmask.training.folder import RunFolder
from unmask.training.run import Interrupted, Run


@pytest.mark.parametrize("method", [[], ["process={name: uniform, block_size: 9}", "decode.cache=block"]])
def test_a_stop_during_an_evaluation_leaves_it_to_the_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: list[str]
) -> None:
    debug_run(tmp_path / "whole", *method).train()
    stopped = debug_run(tmp_path / "stopped", *method)
    real, num_calls = evaluating.evaluate, [0]

    def evaluate(*arguments: object, **options: object) -> object:
        num_calls[0] += 1
        stopped.stop_requested = num_calls[0] == 3  # twice, for ema and raw, at step 4
        return real(*arguments, **options)

    monkeypatch.setattr(evaluating, "evaluate", evaluate)
    with pytest.raises(Interrupted, match="after step 8"):
        stopped.train()
    assert checkpoint.steps(tmp_path / "stopped" / "checkpoints")[-1] == 8
    evaluated = [row["step"] for row in lines(tmp_path / "stopped" / "metrics.jsonl") if "eval/nelbo" in row]
    assert set(evaluated) == {4}
    debug_run(tmp_path / "stopped", *method).train(resume=True)
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "whole")


def test_a_stop_that_comes_after_the_last_look_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = debug_run(tmp_path / "run", "train.checkpoint_every=99")
    real = stopped._is_due

    def is_due(every: int) -> bool:
        # Of checkpoints, this is asked only once stop_requested was found unset.
        stopped.stop_requested |= stopped.progress.step == 5 and every == 99
        return real(every)

    monkeypatch.setattr(stopped, "_is_due", is_due)
    with pytest.raises(Interrupted, match="after step 5"):
        stopped.train()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == 5


def test_a_stop_during_the_last_evaluation_is_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = debug_run(tmp_path / "run", "train.steps=3", "eval.every=99")
    real = evaluating.evaluate

    def evaluate(*arguments: object, **options: object) -> object:
        stopped.stop_requested = True
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "evaluate", evaluate)
        with pytest.raises(Interrupted, match="after step 3"):
            stopped.train()
    debug_run(tmp_path / "run", "train.steps=3", "eval.every=99").train(resume=True)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert "eval/nelbo" in lines(tmp_path / "run" / "metrics.jsonl")[-1]
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints", pytest.fail)
    assert newest is not None
    assert checkpoint.load(newest)["progress"]["best_step"] == 3  # the checkpoint knows of it
    debug_run(tmp_path / "run", "train.steps=3", "eval.every=99").train(resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics  # and it is not made again


@pytest.mark.parametrize("budget", ["train.max_examples=40", "train.max_seconds=1e-6"])
def test_a_budget_ends_a_run_with_an_evaluation_and_a_checkpoint(budget: str, tmp_path: Path) -> None:
    debug_run(tmp_path / "run", budget, "eval.every=99").train()
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert "eval/nelbo" in rows[-1]
    step = rows[-1]["step"]
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == step
    if "examples" in budget:
        assert rows[-3]["examples_seen"] < 40 <= rows[-1]["examples_seen"]
    else:
        assert step == 1
    # A budget may change, and where puzzles are kept.
    debug_run(tmp_path / "run", "train.steps=12", f"data.cache_dir={tmp_path / 'kept'}").train(resume=True)
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 12


def test_a_failing_write_leaves_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    debug_run(tmp_path / "run", "train.steps=2").train()
    before = (tmp_path / "run" / "config.yaml").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunFailed, match=r"No space left.*newest checkpoint is of step 2"):
            debug_run(tmp_path / "run", "train.steps=4").train(resume=True)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    debug_run(tmp_path / "run", "train.steps=4").train(resume=True)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == 4


def test_a_run_that_came_and_went_meanwhile_is_not_touched(tmp_path: Path) -> None:
    late = RunFolder(tmp_path / "run")
    config = recipes.load("debug", [*TWELVE_STEPS, "train.seed=7"])
    late.check(config, resume=False)
    debug_run(tmp_path / "run", "train.steps=2").train()
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        late.open(config, resume=False)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_a_full_disk_is_not_blamed_on_the_name_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullThere(files.FileLock):
        def __init__(self, path: Path, *, wait: bool) -> None:
            if path.is_relative_to(tmp_path):
                raise OSError(errno.ENOSPC, "No space left on device")
            super().__init__(path, wait=wait)

    monkeypatch.setattr(files, "FileLock", FullThere)
    with pytest.raises(RunFailed, match=r"No space left on device.*has no checkpoint yet"):
        debug_run(tmp_path / "run").train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.steps=3"], r"train.steps=3: .*run has a checkpoint of step 4; give 4 or more"),
        (["train.steps=4", "eval.examples=3"], r"eval: .*run is done.*unmask eval"),
        (["train.steps=4", "decode.temperature=0.7"], r"decode: .*run is done.*unmask eval"),
    ],
)
def test_a_run_that_is_done_is_not_rewritten(settings: list[str], message: str, tmp_path: Path) -> None:
    debug_run(tmp_path / "run", "train.steps=4", "optim.schedule=constant").train()
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=message):
        debug_run(tmp_path / "run", "optim.schedule=constant", *settings).train(resume=True)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    debug_run(tmp_path / "run", "train.steps=5", "optim.schedule=constant", "eval.examples=3").train(resume=True)


@pytest.mark.parametrize("budget", ["train.max_examples=40", "train.max_seconds=1e-6"])
def test_a_run_that_a_budget_has_ended_is_not_rewritten(budget: str, tmp_path: Path) -> None:
    debug_run(tmp_path / "run", budget).train()
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"eval: .*run is done.*unmask eval"):
        debug_run(tmp_path / "run", budget, "eval.examples=3").train(resume=True)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    debug_run(tmp_path / "run", "eval.examples=3").train(resume=True)


def test_a_resume_without_a_step_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    debug_run(tmp_path / "run", "train.steps=2").train()
    compiled: list[None] = []
    monkeypatch.setattr(Run, "_compile", lambda self, attention: compiled.append(attention))
    debug_run(tmp_path / "run", "train.steps=2").train(resume=True)
    assert not compiled
    debug_run(tmp_path / "run", "train.steps=3").train(resume=True)
    assert compiled == [None]


def test_a_resume_without_a_step_leaves_the_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    debug_run(tmp_path / "run", "train.steps=2", "optim.schedule=constant").train()
    file = tmp_path / "run" / "environment.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"command": "unmask", "threads": 77}))
    trained = file.read_bytes()
    debug_run(tmp_path / "run", "train.steps=2", "optim.schedule=constant").train(resume=True)
    assert file.read_bytes() == trained
    assert "threads was" not in capsys.readouterr().err
    debug_run(tmp_path / "run", "train.steps=3", "optim.schedule=constant").train(resume=True)
    assert json.loads(file.read_text())["threads"] != 77
    assert "threads was 77" in capsys.readouterr().err


def test_a_refused_resume_leaves_settings_and_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    debug_run(tmp_path / "run", "train.steps=4", "optim.warmup_steps=1").train()
    kept = {name: (tmp_path / "run" / name).read_bytes() for name in ("config.yaml", "environment.json")}
    complete = checkpoint.path_of(tmp_path / "run" / "checkpoints", 4) / checkpoint.COMPLETE
    complete.rename(tmp_path / "aside")
    with pytest.raises(UserError, match="no checkpoint is whole"):
        debug_run(tmp_path / "run", "train.steps=6", "optim.warmup_steps=1").train(resume=True)
    assert {name: (tmp_path / "run" / name).read_bytes() for name in kept} == kept
    (tmp_path / "aside").rename(complete)
    debug_run(tmp_path / "run", "train.steps=6", "optim.warmup_steps=1").train(resume=True)
    assert "optim.schedule=cosine was of 4 steps, is of 6 steps" in " ".join(capsys.readouterr().err.split())


def test_a_rate_that_overflows_is_refused_before_the_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"optim.lr x optim.muon_lr=3e\+300: give 1e\+30 at most"):
        debug_run(tmp_path / "run", "optim.name=muon", "optim.lr=1e300", "optim.muon_lr=3").train()
    assert not (tmp_path / "run").exists()


def test_settings_without_effect_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unused = ["optim.muon_heads=true", "optim.decay_share=0.5"]
    debug_run(tmp_path / "run", "train.steps=1", *unused, "eval.orders=[prob, margin, prob]").train()
    said = " ".join(capsys.readouterr().err.split())
    assert "without effect: optim.muon_heads=true (for name=muon), optim.decay_share=0.5 (for schedule=wsd), " in said
    assert "what eval.orders=[prob, margin, prob] names again" in said


def test_it_is_said_that_fewer_examples_are_held_out_than_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    debug_run(tmp_path / "run", "train.steps=1", "eval.examples=14").train()
    said = "the data hold out 13 examples, and all of them are taken"
    assert f"eval.examples=14: {said}" in " ".join(capsys.readouterr().err.split())
    for arguments, option in ((["--examples", "50"], "--examples 50"), ([], "eval.examples=14")):
        assert run_cli("eval", tmp_path / "run", *arguments) == 0
        assert f"{option}: {said}" in " ".join(capsys.readouterr().err.split())
    assert run_cli("eval", tmp_path / "run", "--examples", "13") == 0
    assert capsys.readouterr().err == ""
    assert run_cli("diagnose", tmp_path / "run", "--only", "nll", "--examples", "50") == 0
    assert f"examples=50: {said}" in " ".join(capsys.readouterr().err.split())
    assert run_cli("diagnose", tmp_path / "run", "--only", "nll") == 0
    assert said not in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("unused", "said"),
    [
        (["train.max_skips=3"], "train.max_skips=3 (for on_bad_numbers=skip)"),
        (
            ["model.rope_theta=5", "model.rotary=false", "model.learned_positions=true"],
            "rope_theta=5.0 (for rotary=true)",
        ),
        (["task.name=sudoku", "data.columns=[a, b]"], "data.columns=[a, b] (for path=..)"),
        (["task.name=sudoku", "data.path=x.csv", "data.puzzles=9"], "data.puzzles=9 (for path=null)"),
    ],
)
def test_what_a_setting_without_effect_needs_is_named(unused: list[str], said: str) -> None:
    assert said in str(restoring.about_unused(recipes.load("debug", unused)))


@pytest.mark.parametrize(
    "used",
    [
        ["train.max_skips=3", "train.on_bad_numbers=skip"],
        ["model.rope_theta=5", "model.rotary=true"],
        ["task.name=sudoku", "data.columns=[a, b]", "data.path=x.csv", "data.puzzles=20000"],
        ["task.name=sudoku", "data.puzzles=9"],
        ["optim.name=muon", "optim.muon_lr=2"],
    ],
)
def test_a_setting_with_effect_is_not_named(used: list[str]) -> None:
    assert restoring.about_unused(recipes.load("debug", used)) is None


def test_a_run_of_rows_that_ends_after_their_stages_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = ["train.steps=1", "process.name=puma", "process.num_stages=4"]
    debug_run(tmp_path / "four", *pool, "process.run=4").train()
    assert "without effect: process.run=4 (a row is done after" in " ".join(capsys.readouterr().err.split())
    debug_run(tmp_path / "three", *pool, "process.run=3").train()
    assert "without effect" not in capsys.readouterr().err


def test_tensorboard_keeps_every_step_of_an_extended_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (4, 6):
        config = recipes.load("debug", [f"train.steps={steps}", "log.every=2", "eval.every=4", "eval.examples=2"])
        Run(config, RunFolder(tmp_path / "run")).train(resume=steps == 6)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]
    assert [event.step for event in events.Scalars("eval/nelbo")] == [4, 6]


def test_damaged_checkpoints_do_not_count_as_the_newest(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, {"x": torch.ones(1)})
    for step in (20, 30):
        (tmp_path / f"step_{step:08d}" / "COMPLETE").unlink()
    checkpoint.set_aside(tmp_path, after=10)
    checkpoint.save(tmp_path, 15, {"x": torch.ones(1)})
    checkpoint.prune(tmp_path, keep_last=1, keep_every=None, keep=set())
    assert checkpoint.steps(tmp_path) == [15]
    assert (tmp_path / "damaged_step_00000030").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    debug_run(tmp_path / "run").train()
    debug_run(tmp_path / "other", "model.dim=16").train()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "other" / "checkpoints").rename(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match=r"of another model: backbone.* is \(.*, 16\), here \(.*is it this run's"):
        debug_run(tmp_path / "run").train(resume=True)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_extending_a_run_says_what_becomes_of_its_learning_rate(
    schedule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optim = [f"optim.schedule={schedule}", "optim.warmup_steps=1", "optim.decay_share=0.5"]
    debug_run(tmp_path / "run", "train.steps=4", *optim).train()
    assert "optim.schedule" not in capsys.readouterr().err
    debug_run(tmp_path / "run", "train.steps=6", *optim).train(resume=True)
    said = " ".join(capsys.readouterr().err.split())
    assert (f"optim.schedule={schedule} was of 4 steps, is of 6 steps" in said) == (schedule != "constant")
    assert ("go on from a checkpoint of step 3 or before" in said) == (schedule == "wsd")


@pytest.mark.parametrize(
    ("schedule", "reached"),
    [("constant", None), ("wsd", "100.0%"), ("cosine", "75.0%")],  # (1 + cos(60 degrees)) / 2
)
def test_a_budget_that_ends_a_schedule_early_is_said(
    schedule: str, reached: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optim = [f"optim.schedule={schedule}", "optim.warmup_steps=0", "optim.decay_share=0.5"]
    budget = ["train.batch_size=4", "process.name=uniform", "train.max_examples=20"]  # five steps: the last is number 4
    debug_run(tmp_path / "run", *optim, *budget).train()
    said = " ".join(capsys.readouterr().err.split())
    expected = f"optim.schedule={schedule} is for 12 steps, and the run ends after 5, at {reached} of optim.lr=0.003"
    assert ("and the run ends" in said, expected in said) == (reached is not None,) * 2
    debug_run(tmp_path / "run", *optim, *budget[:2]).train(resume=True)
    assert "and the run ends" not in capsys.readouterr().err


def test_one_run_gives_several_budgets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under wsd a shorter run, from a checkpoint before its rate falls, is the one from the start, bit for bit."""
    optim = ["optim.schedule=wsd", "optim.warmup_steps=1", "optim.decay_share=0.5", "train.checkpoint_every=2"]
    debug_run(tmp_path / "long", "train.steps=8", "train.keep_every=2", *optim).train()
    debug_run(tmp_path / "short", "train.steps=4", *optim).train()
    shutil.copytree(tmp_path / "long", tmp_path / "branch")
    for step in (4, 6, 8):
        shutil.rmtree(checkpoint.path_of(tmp_path / "branch" / "checkpoints", step))
    capsys.readouterr()
    debug_run(tmp_path / "branch", "train.steps=4", *optim).train(resume=True)
    assert "optim.schedule" not in capsys.readouterr().err
    ours, other = (
        checkpoint.load(checkpoint.path_of(tmp_path / run / "checkpoints", 4)) for run in ("branch", "short")
    )
    for part in ("model", "optimizer", "process"):
        assert_same(ours[part], other[part])
