"""A run's weights, as evaluation, decoding and exports read them."""

from pathlib import Path

import pytest
import torch

import unmask
from tests.training.test_run import make
from unmask.errors import UserError
from unmask.training import loading


def test_the_averages_of_a_model_of_ones_own_are_all_of_its_weights(tmp_path: Path) -> None:
    """With a tied matrix, one name of which was raw among averaged weights, and a first tensor that is a buffer."""
    run = make(tmp_path / "run", "model={name: 'tests.models.ones_own:Tied'}", "ema.decay=0.9", "optim.lr=0.1")
    run.train()
    with run.trainer.weights("ema"):
        expected = {name: value.clone() for name, value in run.trainer.model.state_dict().items()}
    loading.export(tmp_path / "run", tmp_path / "export")
    for source in ("run", "export"):
        loaded = unmask.load(tmp_path / source).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in loaded.items())
    raw = unmask.load(tmp_path / "run", weights="raw").state_dict()
    assert not torch.equal(raw["backbone.head.weight"], expected["backbone.head.weight"])


def test_unknown_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weights 'EMA': use ema or raw"):
        unmask.load(tmp_path, weights="EMA")
