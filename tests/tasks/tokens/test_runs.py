"""Runs on a store of rows, from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import lines, run_cli
from tests.helpers.stores import LENGTH, MASK, ROWS, VOCAB

RECIPE = """
extends: tinygsm/puma
task: {name: tokens}
data: {length: 16, vocab_size: 20, mask_id: 19, eos_id: 18, validation_ratio: 0.25}
model: {preset: tiny}
process: {num_stages: 4}
optim: {lr: 3.0e-3, warmup_steps: 2}
ema: {decay: 0.9}
train: {steps: 6, batch_size: 8, dtype: float32, threads: 1, compile: false, checkpoint_every: 6}
eval: {every: 6, examples: 4}
log: {every: 1, tensorboard: false}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def run(recipe: Path, folder: Path) -> Path:
    """A finished run on the store."""
    out = recipe.parent / "run"
    assert run_cli("train", recipe, f"data.path={folder}", "--out", out) == 0
    return out


def test_training_logs_and_evaluates(run: Path) -> None:
    rows = lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 6]
    assert all(np.isfinite(row["train/loss"]) for row in rows[:-1])
    assert {"eval/nelbo", "eval/accuracy/ema/prob/2", "eval/accuracy/ema/prob/3"} <= rows[-1].keys()


def test_eval_on_held_out_rows_and_on_a_store(run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, examples in (([], 4), (["--data", folder], ROWS), (["--data", folder, "--examples", 5], 5)):
        assert run_cli("eval", run, *arguments, "--json") == 0
        result = json.loads(capsys.readouterr().out)
        assert result["protocol"]["examples"] == examples
        assert 0 < result["nelbo"] < 2 * np.log(VOCAB)  # a model of no idea has log(19)
        assert list(result["accuracy"]) == ["prob/2", "prob/3"]
        for shares in result["shares"].values():
            assert set(shares) == {"accuracy", "exact_match"}
            assert 0 <= shares["exact_match"] <= shares["accuracy"] <= 1


def test_decode_answers_every_prompt(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [[1, 2, 3], [], [4] * 15]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{prompt}\n\n" for prompt in prompts))
    assert run_cli("decode", run, tmp_path / "prompts.jsonl", "--out", tmp_path / "answers.jsonl") == 0
    records = lines(tmp_path / "answers.jsonl")
    assert [record["prompt"] for record in records] == prompts
    assert [record["nfe"] for record in records] == [7, 8, 1]  # two positions a step
    for record in records:
        assert len(record["prompt"]) + len(record["answer"]) == LENGTH
        assert set(record["answer"]) <= set(range(VOCAB)) - {MASK}
    (tmp_path / "bad.jsonl").write_text("[1]\n[19, 20]\n")
    assert run_cli("decode", run, tmp_path / "bad.jsonl") == 2
    assert (
        "bad.jsonl, line 2: not a list of token ids below 20 other than the mask, or null to fill in: [19, 20]"
        in capsys.readouterr().err
    )


BAD_TRAINING = {
    "no path": ([], ["data.path is missing", "labels.bin, prompt_mask.bin and meta.json"]),
    "absent": (["data.path=nowhere"], ["nowhere/meta.json: cannot be read", "data.path is a folder"]),
    "length": (["data.path=STORE", "data.length=24"], ["its rows have 16 tokens; set data.length=16"]),
    "vocabulary": (
        ["data.path=STORE", "data.vocab_size=10", "data.mask_id=9", "data.eos_id=8"],
        ["STORE: row ", "holds the mask or an id out of data.vocab_size"],
    ),
}


@pytest.mark.parametrize(("arguments", "parts"), BAD_TRAINING.values(), ids=BAD_TRAINING.keys())
def test_bad_training_input(
    arguments: list[str],
    parts: list[str],
    recipe: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = [argument.replace("STORE", str(folder)) for argument in arguments]
    assert run_cli("train", recipe, *overrides, "--out", tmp_path / "run") == 2
    message = " ".join(capsys.readouterr().err.split())
    for part in parts:
        assert part.replace("STORE", str(folder)) in message
    assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["step", "decode"])
def test_bench_needs_no_data(verb: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--count", "1"] if verb == "step" else ["--rows", "2"]
    assert run_cli("bench", verb, recipe, "data.prompt_length=4", *size, "--json") == 0
    assert json.loads(capsys.readouterr().out)["peak_rss_bytes"] > 0
    assert run_cli("bench", verb, recipe, *size) == 2
    assert "data.prompt_length=100: leaves nothing of data.length=16" in capsys.readouterr().err
