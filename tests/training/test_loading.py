"""A run's weights, as evaluation, decoding and exports read them."""

from pathlib import Path

import pytest
import torch

import unmask
from tests.helpers.runs import debug_run
from unmask.decoding.config import DecodeConfig
from unmask.errors import UserError
from unmask.models.precision import resolve_device
from unmask.training.loading import LoadedRun


def test_the_averages_of_a_model_of_ones_own_are_all_of_its_weights(tmp_path: Path) -> None:
    """With a tied matrix, one name of which was raw among averaged weights, and a first tensor that is a buffer."""
    run = debug_run(tmp_path / "run", "model={name: 'tests.models.ones_own:Tied'}", "ema.decay=0.9", "optim.lr=0.1")
    run.train()
    with run.trainer.weights("ema"):
        expected = {name: value.clone() for name, value in run.trainer.model.state_dict().items()}
    unmask.export(tmp_path / "run", tmp_path / "export")
    for source in ("run", "export"):
        loaded = unmask.load(tmp_path / source).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in loaded.items())
    raw = unmask.load(tmp_path / "run", weights="raw").state_dict()
    assert not torch.equal(raw["backbone.head.weight"], expected["backbone.head.weight"])


def test_unknown_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weights 'EMA': use ema or raw"):
        unmask.load(tmp_path, weights="EMA")


def test_a_run_and_its_export_open_alike(tmp_path: Path) -> None:
    debug_run(tmp_path / "run", "ema.decay=0.9").train()
    unmask.export(tmp_path / "run", tmp_path / "export", weights="raw")
    run = LoadedRun.open(tmp_path / "run", weights="raw")
    exported = LoadedRun.open(tmp_path / "export")
    for key in ("config", "tokens", "weights", "step", "device"):
        assert getattr(run, key) == getattr(exported, key)
    canvases = run.task.validation(4).masked(run.tokens.mask_id)
    settings = run.config.decode.model_copy(update={"tokens_per_step": 20})
    assert torch.equal(
        run.decoder(settings).decode(canvases).tokens, exported.decoder(settings).decode(canvases).tokens
    )
    with pytest.raises(UserError, match="an export holds no training; give the run that it was made from"):
        exported.trainer()


@pytest.mark.parametrize("process", ["uniform", "puma"])
def test_its_trainer_goes_on_where_the_checkpoint_ended(process: str, tmp_path: Path) -> None:
    trained = debug_run(tmp_path / "run", f"process.name={process}", "ema.decay=0.9")
    trained.train()
    run = LoadedRun.open(tmp_path / "run")
    trainer = run.trainer()
    assert trainer is run.trainer()
    assert trainer.step_number == run.step == 12
    for weights in ("ema", "raw"):
        with trained.trainer.weights(weights), trainer.weights(weights):
            expected = trained.trainer.model.state_dict()
            assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())
    ours, theirs = (own.process.next_batch(own.stream) for own in (trainer, trained.trainer))
    assert torch.equal(ours.xt, theirs.xt)


def test_a_run_of_another_machine_opens_on_this_one(tmp_path: Path) -> None:
    debug_run(tmp_path / "run", "train.device=cpu").train()
    assert LoadedRun.open(tmp_path / "run").device == torch.device("cpu")
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("device: cpu", "device: cuda:99"))
    assert LoadedRun.open(tmp_path / "run").device == resolve_device("auto")
    with pytest.raises(UserError, match="device cuda:99: not on this machine"):
        LoadedRun.open(tmp_path / "run", device="cuda:99")


def test_a_decoder_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    debug_run(tmp_path / "run").train()
    run = LoadedRun.open(tmp_path / "run")
    with pytest.raises(UserError, match="needs a model that has also seen hidden prompts"):
        run.decoder(DecodeConfig(guidance=1.0, dtype="float64"))
    with pytest.raises(UserError, match="the vocabulary has"):
        run.decoder(DecodeConfig(forbid=[1000], dtype="float64"))
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    run.decoder(DecodeConfig(dtype="float64"))
    assert {p.dtype for p in run.model.parameters()} == {torch.float64}
