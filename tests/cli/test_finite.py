"""What the verbs say of a model that gives nan, and of a single example."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers import run_cli
from tests.helpers.sudoku import EASY


def test_a_model_that_gives_nan_is_a_failure(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, in one line, and no answers: of weights that are finite, but overflow."""
    model, prompts = tmp_path / "model", tmp_path / "boards.txt"
    prompts.write_text(EASY + "\n")
    assert run_cli("export", run, model) == 0
    tensors = load_file(model / "model.safetensors")
    tensors["backbone.norm.weight"].fill_(3e38)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    for verb in (["decode", model, prompts, "--out", tmp_path / "answers"], ["eval", model, "--examples", 2, "--json"]):
        assert run_cli(*verb) == 1
        out, said = capsys.readouterr()
        assert out == ""
        assert "the model gives nan" in said
        assert "Traceback" not in said
    assert not (tmp_path / "answers").exists()


def test_one_example_has_no_standard_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("eval", run, "--examples", 1, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nelbo_stderr"] is None
    assert set(found["accuracy_stderr"].values()) == {None}
    assert run_cli("eval", run, "--examples", 1) == 0
    assert "±" not in capsys.readouterr().out
