"""Losses and gradients that are not finite."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers import assert_same, lines, metrics_of, run_cli
from tests.helpers.runs import tiny_run
from unmask.errors import RunFailed
from unmask.models.denoiser import Denoiser
from unmask.training import checkpoint
from unmask.training.trainer import Trainer
from unmask.types import MaskedBatch, TokenStats

TEN = ["train.steps=10", "train.checkpoint_every=2", "train.keep_last=9"]


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int, where: str = "loss") -> None:
    """The numbers of these steps (from 1) are not finite."""
    real = Trainer._forward_backward

    def diverge(trainer: Trainer, batch: object) -> tuple[Tensor, object]:
        loss, stats = real(trainer, batch)
        if trainer.step_number + 1 not in steps:
            return loss, stats
        if where == "gradient":
            next(trainer.model.parameters()).grad[0, 0] = math.inf
            return loss, stats
        return loss * math.nan, stats

    monkeypatch.setattr(Trainer, "_forward_backward", diverge)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_run_stops_before_the_update_and_keeps_the_batch(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 4, where=where)
    run = tiny_run(tmp_path / "run", *TEN, "log.every=100")
    with pytest.raises(RunFailed, match=r"step 4: the loss is .*on_bad_numbers=skip.*train.init="):
        run.train()
    assert run.trainer.step_number == 4
    reached = {name: tensor.clone() for name, tensor in run.trainer.model.state_dict().items()}
    monkeypatch.undo()
    tiny_run(tmp_path / "plain", *TEN, "train.checkpoint_every=3").train()
    assert_same(checkpoint.load(tmp_path / "plain/checkpoints/step_00000003")["model"], reached)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2]
    kept = load_file(tmp_path / "run" / "bad_batches" / "step_00000004.safetensors")
    assert {"x0", "xt", "scored", "weight", "nll", "top1"} == kept.keys()
    assert kept["x0"].shape == (4, 4)


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, 2)
    settings = ["train.steps=3", "log.tensorboard=false", "eval.examples=2"]
    assert run_cli("train", "debug", *settings, "--out", tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert "step 2: the loss is nan" in said
    assert "bad_batches/step_00000002.safetensors" in said
    assert "Traceback" not in said


def test_a_step_that_is_skipped_changes_no_weight_and_no_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 4)
    tiny_run(tmp_path / "run", *TEN, "train.checkpoint_every=1", "train.on_bad_numbers=skip").train()
    third, fourth, last = (checkpoint.load(tmp_path / f"run/checkpoints/step_{step:08d}") for step in (3, 4, 10))
    assert_same(fourth["model"], third["model"])
    assert_same(fourth["optimizer"], third["optimizer"])
    assert all(tensor.isfinite().all() for tensor in last["model"].values())
    rows = metrics_of(tmp_path / "run")
    assert [row["train/skips"] for row in rows if "train/loss" in row] == [0, 0, 0, *[1] * 7]
    assert rows[3]["train/loss"] is None  # JSON has no NaN
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_skips_are_counted_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip = ["train.on_bad_numbers=skip", "train.max_skips=2"]
    spoil(monkeypatch, 3, 4, 7)
    with pytest.raises(RunFailed, match=r"step 7.*train.max_skips=2"):
        tiny_run(tmp_path / "run", *TEN, *skip).train()
    with pytest.raises(RunFailed, match=r"step 7.*train.max_skips=2"):
        tiny_run(tmp_path / "run", *TEN, *skip).train(resume=True)
    tiny_run(tmp_path / "run", *TEN, *skip, "train.max_skips=3").train(resume=True)
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 10


SAVING = [*TEN, "train.checkpoint_every=1"]


def test_the_way_on_is_that_of_the_setting_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 3, 7)
    with pytest.raises(RunFailed, match=r"one more than train.max_skips=1: start a new run"):
        tiny_run(tmp_path / "run", *SAVING, "train.on_bad_numbers=skip", "train.max_skips=1").train()
    with pytest.raises(RunFailed, match=r"with --resume train.on_bad_numbers=skip, .* with train.init="):
        tiny_run(tmp_path / "run", *SAVING).train(resume=True)
    with pytest.raises(RunFailed, match=r"There is no checkpoint yet: start a new run with a lower optim.lr"):
        tiny_run(tmp_path / "new", *TEN, "train.checkpoint_every=9").train()


@pytest.mark.gpu
def test_on_a_gpu_it_is_known_when_the_next_step_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 4)
    settings = ["train.device=cuda", "train.checkpoint_every=99", "log.every=99"]
    run = tiny_run(tmp_path / "run", *TEN, *settings)
    with pytest.raises(RunFailed, match="step 4"):
        run.train()
    assert run.trainer.step_number == 5
    assert all(tensor.isfinite().all() for tensor in run.trainer.model.state_dict().values())
    assert (tmp_path / "run" / "bad_batches" / "step_00000004.safetensors").exists()
    skipping = tiny_run(tmp_path / "skipping", *TEN, *settings, "train.on_bad_numbers=skip")
    skipping.train()
    assert skipping.progress.skips == 1


def test_an_evaluation_of_nan_does_not_end_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is logged as unknown, and is not the best; the training is what it would have been."""
    settings = [*TEN, "eval.every=5", "log.every=5"]
    tiny_run(tmp_path / "plain", *settings).train()
    real, asked = Denoiser.forward, []

    def overflow(model: Denoiser, batch: MaskedBatch) -> TokenStats:
        stats = real(model, batch)
        if not model.training:
            asked.append(1)
        return replace(stats, nll=stats.nll * math.nan) if len(asked) == 1 and not model.training else stats

    monkeypatch.setattr(Denoiser, "forward", overflow)
    tiny_run(tmp_path / "run", *settings).train()
    assert "step 5: not evaluated: the model gives nan for example 0" in capsys.readouterr().err
    found = {row["step"]: row["eval/nelbo"] for row in metrics_of(tmp_path / "run") if "eval/nelbo" in row}
    assert found[5] is None
    assert found[10] is not None
    ours, plain = (checkpoint.load(tmp_path / name / "checkpoints" / "step_00000010") for name in ("run", "plain"))
    assert_same(ours["model"], plain["model"])
    assert ours["progress"]["best_step"] == 10


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_weights_that_are_not_finite_are_never_saved(decay: float, tmp_path: Path) -> None:
    """The last step's update gives them: no loss after it says so. What was saved before stays."""
    run, settings = tmp_path / "run", [*TEN[1:], f"ema.decay={decay}", "optim.grad_clip=null", "optim.warmup_steps=0"]
    with pytest.raises(RunFailed, match=r"step 1: weight .* holds (nan|infinity).*an optim\.lr below 1e\+39"):
        tiny_run(run, *settings, "train.steps=1", "optim.lr=1e39").train()
    assert checkpoint.steps(run / "checkpoints") == []


def test_an_average_or_moment_that_is_not_finite_ends_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.step

    def spoil_average(trainer: Trainer) -> object:
        if trainer.step_number == 5:
            next(iter(trainer.ema.shadow.values())).view(-1)[0] = math.inf
        return real(trainer)

    monkeypatch.setattr(Trainer, "step", spoil_average)
    with pytest.raises(RunFailed, match=r"step 6: averaged weight .* holds infinity, so this step is not saved"):
        tiny_run(tmp_path / "run", *TEN, "ema.decay=0.9").train()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2, 4]
