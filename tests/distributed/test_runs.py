"""Runs of two processes, as a user starts them: one folder, one voice, and one end."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.launching import ROOT, Launched, launch
from tests.helpers import assert_same, lines, run_cli
from unmask.training import checkpoint

TINY = ["train.dtype=float64", "train.batch_size=4", "data.puzzles=64", "log.tensorboard=false", "log.every=1"]
SHORT = [*TINY, "train.steps=4", "train.checkpoint_every=2", "eval.every=2", "eval.examples=5"]
LONG = [*TINY, "train.steps=100000", "train.checkpoint_every=100000", "eval.every=100000"]
SECONDS = 120


def command(out: Path, *settings: str) -> list[str]:
    return ["unmask", "train", "debug", *settings, "--out", str(out)]


def wait_for_steps(out: Path, count: int, launched: Launched) -> None:
    deadline = time.monotonic() + SECONDS
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_bytes().splitlines()) < count:
        assert all(process.poll() is None for process in launched.processes), launched.said(0) + launched.said(1)
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def two_long_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Launched]]:
    """Started together, as starting takes the time."""
    folder = tmp_path_factory.mktemp("long")
    settings = {"stopped": LONG, "killed": [*LONG, "train.parallel=fsdp"], "frozen": [*LONG, "train.timeout=5"]}
    runs = {}
    for name, own in settings.items():
        runs[name] = folder / name, launch([command(folder / name, *own)] * 2, folder / "logs" / name)
    yield runs
    for _, launched in runs.values():
        launched.end()


def test_a_signal_to_one_process_stops_both_at_one_step(two_long_runs: dict[str, tuple[Path, Launched]]) -> None:
    out, launched = two_long_runs["stopped"]
    wait_for_steps(out, 3, launched)
    launched.processes[1].send_signal(signal.SIGUSR1)
    assert launched.wait(SECONDS) == [130, 130], launched.said(0) + launched.said(1)
    (step,) = checkpoint.steps(out / "checkpoints")
    assert step == lines(out / "metrics.jsonl")[-1]["step"]
    assert f"stopped after step {step}; continue with --resume" in launched.said(0)
    assert launched.said(1) == ""


def test_a_process_that_is_killed_is_missed(two_long_runs: dict[str, tuple[Path, Launched]]) -> None:
    out, launched = two_long_runs["killed"]
    wait_for_steps(out, 3, launched)
    launched.processes[1].kill()
    assert launched.wait(SECONDS) == [1, -signal.SIGKILL]
    assert "Error: rank 0 of 2 waited for another process, which ended or did not answer" in launched.said(0)
    assert "Traceback" not in launched.said(0)


def test_a_process_that_does_not_answer_is_waited_for_no_longer(
    two_long_runs: dict[str, tuple[Path, Launched]],
) -> None:
    out, launched = two_long_runs["frozen"]
    wait_for_steps(out, 3, launched)
    launched.processes[1].send_signal(signal.SIGSTOP)
    assert launched.processes[0].wait(30) == 1
    assert "within train.timeout=5 s" in launched.said(0)


def test_settings_that_differ_are_named_once(tmp_path: Path) -> None:
    out = tmp_path / "run"
    launched = launch([command(out, *SHORT), command(out, *SHORT, "optim.lr=0.5", "train.seed=3")], tmp_path / "logs")
    assert launched.wait(SECONDS) == [2, 2], launched.said(0) + launched.said(1)
    assert "the processes were not started alike" in launched.said(0)
    assert "optim.lr: 0.003 on rank 0, 0.5 on rank 1" in launched.said(0)
    assert "train.seed: 0 on rank 0, 3 on rank 1" in launched.said(0)
    assert launched.said(1) == ""
    assert not out.exists()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_torchrun_trains_evaluates_and_leaves_a_run_that_one_process_goes_on_with(
    parallel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers are those of one process, up to the order of sums."""
    two, one = tmp_path / "two", tmp_path / "one"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    start = [*launcher, *command(two, *SHORT, f"train.parallel={parallel}")]
    done = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Done:") == 1
    assert done.stderr.count("step 4: ") == 1
    assert run_cli("train", "debug", *SHORT, "--out", one) == 0
    assert_near(lines(two / "metrics.jsonl"), lines(one / "metrics.jsonl"))
    assert json.loads((two / "environment.json").read_text())["processes"] == 2
    written = {path.name for path in (two / "checkpoints" / "step_00000004").glob("model*")}
    each = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert written == ({"model.safetensors"} if parallel == "ddp" else each)
    assert run_cli("export", two, tmp_path / "export") == 0
    capsys.readouterr()
    alone = ["train.parallel=ddp", "train.steps=6"]
    assert run_cli("train", "debug", *SHORT, *alone, "--out", two, "--resume") == 0
    assert run_cli("train", "debug", *SHORT, "train.steps=6", "--out", one, "--resume") == 0
    assert "processes was 2, is 1" in capsys.readouterr().err
    assert_near(lines(two / "metrics.jsonl"), lines(one / "metrics.jsonl"))


def assert_near(ours: list[dict], expected: list[dict]) -> None:
    assert len(ours) == len(expected)
    for row, other in zip(ours, expected, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - {"seconds"}:
            assert row[name] == pytest.approx(other[name], rel=1e-8), name  # fp64; Adam enlarges rounding


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_bad_numbers_of_one_process_change_no_weights_and_are_told_of_it(parallel: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ["process={name: 'tests.distributed.spoiled:Spoiled'}", "train.on_bad_numbers=skip"]
    launched = launch([command(out, *SHORT, *settings, f"train.parallel={parallel}")] * 2, tmp_path / "logs")
    assert launched.wait(SECONDS) == [0, 0], launched.said(0) + launched.said(1)
    assert "step 2, rank 1: the loss is nan" in " ".join(launched.said(0).split())
    assert [path.name for path in (out / "bad_batches").iterdir()] == ["step_00000002_rank_1.safetensors"]
    state = checkpoint.load(out / "checkpoints" / "step_00000004")
    assert all(weight.isfinite().all() for weight in state["model"].values())
    assert state["progress"]["skips"] == 1


@pytest.mark.slow
def test_two_processes_in_shares_killed_twelve_times_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    """One of them, or both, at any moment; then three go on with what two have saved."""
    rng = random.Random(0)
    settings = ["train.batch_size=6", "train.steps=300", "train.checkpoint_every=1", "eval.every=1000"]
    settings = [*TINY, *settings, "train.parallel=fsdp", "train.timeout=20", "eval.examples=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert launch([command(whole, *settings)] * 2, tmp_path / "logs").wait(SECONDS) == [0, 0]
    reached = [0]
    for number in range(12):
        launched = launch([[*command(killed, *settings), "--resume"]] * 2, tmp_path / "logs" / str(number))
        wait_until_it_says(launched, "Resuming" if checkpoint.steps(killed / "checkpoints") else "starting at step 0")
        time.sleep(rng.uniform(0, 1.5))
        for process in rng.choice([launched.processes, launched.processes[:1], launched.processes[1:]]):
            process.kill()
        assert launched.wait(SECONDS) != [0, 0], "the run ended before it was killed: give it more steps"
        reached.append(checkpoint.steps(killed / "checkpoints")[-1] if (killed / "checkpoints").exists() else 0)
    assert reached == sorted(reached)
    assert reached[-1] > 12
    last = launch([[*command(killed, *settings), "--resume"]] * 2, tmp_path / "logs" / "last")
    assert last.wait(SECONDS) == [0, 0], last.said(0)
    ours, expected = (checkpoint.load(out / "checkpoints" / "step_00000300") for out in (killed, whole))
    for part in ("model", "optimizer", "ema", "process"):
        assert_same(ours[part], expected[part])
    three = launch([[*command(killed, *settings, "train.steps=302"), "--resume"]] * 3, tmp_path / "logs" / "three")
    assert three.wait(SECONDS) == [0, 0, 0], three.said(0)
    assert "processes was 2, is 3" in three.said(0)


def wait_until_it_says(launched: Launched, words: str) -> None:
    deadline = time.monotonic() + SECONDS
    while words not in launched.said(0):
        assert time.monotonic() < deadline, launched.said(0)
        time.sleep(0.01)
