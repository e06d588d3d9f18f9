"""A self-conditioned run, as a user has one."""

import json
from pathlib import Path

import pytest
import torch

import unmask
from tests.helpers import SHORT, run_cli

ON = "model.self_conditioning=true"
STILL = ["train.steps=1", "optim.lr=1e-12", "optim.weight_decay=0"]


def test_a_plain_run_can_become_one_but_not_the_other_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, told, again, exported = (tmp_path / name for name in ("plain", "told", "again", "export"))
    assert run_cli("train", "debug", *SHORT, "--out", plain) == 0
    assert run_cli("train", "debug", *SHORT, *STILL, ON, f"train.init={plain}", "--out", told) == 0
    before, after = (unmask.load(each, weights="raw").state_dict() for each in (plain, told))
    assert after.pop("backbone.conditioning.weight").abs().max() < 1e-9
    for name, value in unmask.load(plain).state_dict().items():
        assert torch.allclose(after[name], value, atol=1e-9), name
    assert before.keys() == after.keys()
    capsys.readouterr()
    assert run_cli("train", "debug", *SHORT, f"train.init={told}", "--out", again) == 2
    assert "backbone.conditioning.weight is (32, 32), here missing" in capsys.readouterr().err
    assert run_cli("export", told, exported) == 0
    assert unmask.load(exported).is_self_conditioned  # whole: its weights and its setting
    for one, other in zip(unmask.load(exported).parameters(), unmask.load(told).parameters(), strict=True):
        assert torch.equal(one, other)


def test_its_speed_can_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("bench", "step", "debug", ON, "--count", "4", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert run_cli("bench", "step", "debug", "--count", "4", "--json") == 0
    assert told["parameters"] == json.loads(capsys.readouterr().out)["parameters"] + 32 * 32
    assert told["seconds_per_step"] > 0
