"""`unmask compare`, with trainings in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import lines, run_cli

TINY = ["task.name=toy", "train.batch_size=16", "train.checkpoint_every=5", "log.every=5", "log.tensorboard=false"]
TINY += ["eval.every=5", "eval.examples=20", "eval.tokens_per_step=[1]"]


@pytest.fixture
def recipes_of_mine(tmp_path: Path) -> list[str]:
    (tmp_path / "plain.yaml").write_text("extends: debug\nprocess: {name: uniform}\n")
    (tmp_path / "pool.yaml").write_text("extends: debug\n")
    return [str(tmp_path / "plain.yaml"), str(tmp_path / "pool.yaml")]


def test_it_trains_says_and_goes_on(
    recipes_of_mine: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["compare", *recipes_of_mine, *TINY, "--out", out]
    assert run_cli(*arguments, "--steps", "10", "--seeds", "1", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["curves"]) == ["plain", "pool"]
    assert result["curves"]["plain"][0]["step"] == [5, 10]
    assert result["curves"]["plain"][0]["examples_seen"] == [80, 160]
    assert json.loads((out / "comparison.json").read_text()) == result
    first = (out / "plain" / "seed_0" / "metrics.jsonl").read_bytes()
    assert run_cli(*arguments, "--steps", "10", "--seeds", "2") == 0
    printed = capsys.readouterr().out
    assert "plain's final" in printed
    assert "fewer" in printed
    assert (out / "plain" / "seed_0" / "metrics.jsonl").read_bytes() == first  # done already, not trained again
    assert lines(out / "pool" / "seed_1" / "metrics.jsonl")[-1]["step"] == 10


def test_a_budget_of_examples(recipes_of_mine: list[str], tmp_path: Path) -> None:
    arguments = ["--examples", "100", "--steps", "50", "--seeds", "1", "--out", tmp_path / "out"]
    assert run_cli("compare", *recipes_of_mine, *TINY, *arguments) == 0
    last = {name: lines(tmp_path / "out" / name / "seed_0" / "metrics.jsonl")[-1] for name in ("plain", "pool")}
    assert last["plain"]["step"] == 7  # 16 new ones a step
    assert last["pool"]["step"] > 7
    assert all(100 <= row["examples_seen"] < 116 for row in last.values())


def test_a_signal_stops_all_of_them_and_the_same_command_goes_on(recipes_of_mine: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "unmask", "compare", *recipes_of_mine, *TINY, "--steps", "3000", "--seeds", "1"]
    process = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.PIPE, env=os.environ, text=True)
    deadline = time.monotonic() + 120
    while not all((out / name / "seed_0" / "metrics.jsonl").exists() for name in ("plain", "pool")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "the same command goes on" in stderr
    for name in ("plain", "pool"):
        assert "continue with --resume" in (out / name / "seed_0.log").read_text()


BAD = {
    "one recipe": (["debug"], "give two recipes or more"),
    "the same twice": (["debug", "debug"], "give two recipes or more"),
    "unknown recipe": (["debug", "sudoku/pumma"], "did you mean sudoku/puma?"),
    "two tasks": (["debug", "TOY"], "of different tasks (sudoku, toy)"),
    "a loss": (["debug", "sudoku/puma", "--measure", "train/loss"], "give one of eval/accuracy/ema/prob/3, eval/nelbo"),
    "wrong setting": (["debug", "sudoku/puma", "train.batch_size=0"], "train.batch_size=0"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = tmp_path / "toy.yaml"
    toy.write_text("extends: debug\ntask: {name: toy}\neval: {tokens_per_step: [1]}\n")
    arguments = [str(toy) if argument == "TOY" else argument for argument in arguments]
    assert run_cli("compare", *arguments, "--out", tmp_path / "out") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_training_that_fails_ends_the_comparison(
    recipes_of_mine: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "pool" / "seed_0").mkdir(parents=True)
    (tmp_path / "out" / "pool" / "seed_0" / "metrics.jsonl").mkdir()
    assert run_cli("compare", *recipes_of_mine, *TINY, "--seeds", "1", "--out", tmp_path / "out") == 2
    assert "is not empty, and holds no run" in capsys.readouterr().err
    assert run_cli("compare", *recipes_of_mine, *TINY, "optim.lr=1e30", "--seeds", "1", "--out", tmp_path / "x") == 1
    assert "the loss is" in capsys.readouterr().err
