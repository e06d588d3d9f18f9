"""`unmask diagnose`, as a user types it."""

import json
from pathlib import Path

import pytest

from tests.helpers import SHORT, run_cli
from unmask.lab.diagnostics.diagnose import _plus_minus


def test_it_prints_one_json_object(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--examples", "4", "--draws", "2", "--per-bin", "2"]
    assert run_cli("diagnose", run, *few, "--decoder", "margin,tokens_per_step=9", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert (found["run"], found["step"], found["weights"], found["missing"]) == (str(run), 4, "ema", {})
    assert sum(own["share"] for own in found["nll"]["rate"]) == pytest.approx(1)
    assert found["mismatch"]["decoder"] == "margin/9"
    assert found["mismatch"]["trained"]["whole"]["value"] is not None
    assert found["mistakes"] is None
    assert found["overfitting"]["examples"] == 4
    assert found["noise"]["weights"] == "raw"


def test_it_prints_tables_of_what_was_asked_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("diagnose", run, "--only", "nll", "--examples", "4", "--weights", "raw", "--step", "2") == 0
    said = capsys.readouterr()
    assert "step 2, raw weights" in said.out
    assert "NLL by distance to the nearest visible token" in said.out
    assert "MMD" not in said.out
    assert said.err == ""


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (2.10563, 0.0032, "2.1056 ± 0.0032"),
        (2.1, 0.03, "2.100 ± 0.030"),
        (123.456, 17.2, "123 ± 17"),
        (-0.01234, 0.12, "-0.01 ± 0.12"),
        (0.5, 0.0, "0.5 ± 0"),
        (1.234e-7, 2.1e-8, "1.23e-07 ± 2.1e-08"),
        (2.10563, None, "2.11"),
        (float("nan"), 0.1, "unknown"),
    ],
)
def test_values_have_the_digits_that_their_errors_support(value: float, error: float | None, shown: str) -> None:
    assert _plus_minus(value, error) == shown


def test_mistakes_are_measured_if_asked_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["diagnose", run, "--only", "mistakes", "--examples", "4", "--decoder", "margin,tokens_per_step=9"]
    assert run_cli(*asked, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert (found["mistakes"]["decoder"], found["mistakes"]["examples"], found["nll"]) == ("margin/9", 4, None)
    assert sum(own["mistakes"] for own in found["mistakes"]["bins"]) == found["mistakes"]["wrong"] > 0
    assert run_cli(*asked) == 0
    assert "First wrong token of margin/9: 4 of 4 examples have one" in capsys.readouterr().out


def test_of_a_causal_run_it_says_what_makes_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    causal = [
        "task.name=toy",
        "data.prompt_length=1",
        "model.causal=true",
        "model.alignment=next",
        "process={name: ar}",
    ]
    decoder = ["decode.confidence=left_to_right", "eval.confidences=[left_to_right]", "eval.tokens_per_step=[1]"]
    assert run_cli("train", "debug", *SHORT, *causal, *decoder, "--out", tmp_path / "ar") == 0
    capsys.readouterr()
    assert run_cli("diagnose", tmp_path / "ar", "--examples", "8", "--per-bin", "4", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert list(found["missing"]) == ["nll", "mismatch"]
    assert all("a causal model" in reason for reason in found["missing"].values())
    assert found["overfitting"]["held_out"]["value"] > 0
    assert [own["canvases"] for own in found["noise"]["bins"]] == [4]
    only = ["--only", "mistakes", "--only", "overfitting", "--decoder", "threshold=0.9"]
    assert run_cli("diagnose", tmp_path / "ar", "--examples", "8", *only) == 0
    assert "Not measured, mistakes: a causal model decodes left to right" in " ".join(capsys.readouterr().out.split())


BAD = {
    "unknown diagnostic": (
        ["--only", "wit"],
        "--only wit: no such diagnostic; use nll, mismatch, mistakes, overfitting, noise",
    ),
    "no such checkpoint": (["--step", "3"], "no checkpoint of step 3; there are 2, 4"),
    "unknown weights": (["--weights", "wit"], "--weights wit: use ema or raw"),
    "wrong decoder": (["--decoder", "wit"], "unknown order"),
    "a decoder that the model cannot be": (["--decoder", "prob,cache=block"], "decode.cache=block"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("diagnose", run, *arguments) == 2
    said = capsys.readouterr()
    assert message in " ".join(said.err.split())
    assert said.out == ""


def test_an_export_holds_no_training(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("export", run, tmp_path / "export") == 0
    assert run_cli("diagnose", tmp_path / "export") == 2
    assert "an export holds no training; give the run" in " ".join(capsys.readouterr().err.split())
