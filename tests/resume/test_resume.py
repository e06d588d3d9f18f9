"""A run that was stopped, however, goes on bit for bit."""

import json
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.helpers import assert_same, metrics_of, run_cli
from unmask.models.denoiser import Denoiser
from unmask.training import checkpoint
from unmask.training.logging import lines_that_count
from unmask.training.trainer import Trainer

PROCESSES = {
    "uniform": ["process={name: uniform}"],
    "independent": ["process={name: uniform, time: beta, masking: independent, weight: elbo}"],
    "puma": ["process={name: puma, num_stages: 4, time: beta}"],
    "puma_threshold": ["process={name: puma, num_stages: 4, threshold: 0.15, confidence: margin}"],
    "puma_schedule": ["process={name: puma, num_stages: 3, stage_schedule: [[7, 6], [15, 2]], threshold: 0.2}"],
    "puma_variable": ["process={name: puma_variable, tokens_per_step: 5, threshold: 0.2}"],
    "block_uniform": ["process={name: uniform, block_size: 27}"],
    "block_puma": [
        "process={name: puma, num_stages: 3, stage_schedule: [[7, 6], [15, 2]], threshold: 0.2, block_size: 27}"
    ],
    "puma_entropy_bound": ["process={name: puma, num_stages: 4, confidence: neg_entropy, entropy_bound: 2}"],
    "ar": [
        *("process={name: ar}", "model.causal=true", "model.alignment=next", "data.layout=two_grid"),
        *("decode.confidence=left_to_right", "eval.confidences=[left_to_right]", "eval.tokens_per_step=[1]"),
    ],
    "self_conditioned": ["process={name: puma, num_stages: 4, threshold: 0.2}", "model.self_conditioning=true"],
    "puma_random": [
        "process={name: puma, num_stages: 4, confidence: random}",
        "model.dropout=0.1",
        "train.accumulate=2",
    ],
}
TWENTY = ["train.steps=20", "train.checkpoint_every=10", "train.keep_last=9", "log.every=1", "log.tensorboard=false"]
EVALUATION_ON, EVALUATION_OFF = (
    ["eval.every=5", "eval.examples=4", "eval.tokens_per_step=[20]"],
    ["eval.every=1000", "eval.examples=2"],
)


def final_state(run: Path, step: int = 20) -> dict:
    state = checkpoint.load(run / "checkpoints" / f"step_{step:08d}")
    state["progress"] = {"step": state["progress"]["step"]}  # seconds differ, and how often was evaluated may
    return state


@pytest.mark.parametrize("process", PROCESSES)
def test_twenty_steps_are_ten_and_a_new_process_and_ten(process: str, tmp_path: Path) -> None:
    settings = [*TWENTY, *PROCESSES[process]]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_cli("train", "debug", *EVALUATION_ON, *settings, "--out", whole) == 0
    # train.steps decides the learning rate's fall: stop at 10 of the same 20 steps by removing what came later.
    assert run_cli("train", "debug", *EVALUATION_OFF, *settings, "--out", parts) == 0
    assert_same(final_state(parts), final_state(whole))  # evaluating changes nothing
    for path in (parts / "checkpoints").glob("step_*20"):
        for file in path.iterdir():
            file.unlink()
    command = [
        sys.executable,
        "-m",
        "unmask",
        "train",
        "debug",
        *EVALUATION_ON,
        *settings,
        "--out",
        str(parts),
        "--resume",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "COMPLETE is missing" in done.stderr
    assert "from step 10" in done.stderr
    assert_same(final_state(parts), final_state(whole))
    assert [row for row in metrics_of(parts) if row["step"] > 10] == [
        row for row in metrics_of(whole) if row["step"] > 10
    ]


def start(out: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "unmask", "train", "debug", *LONG, *arguments, "--out", str(out)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


LONG = [
    "train.steps=200",
    "train.checkpoint_every=7",
    "log.every=1",
    "log.tensorboard=false",
    "eval.every=50",
    "eval.examples=4",
]


def wait_for_metrics(out: Path, count: int, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill_at_random(process: subprocess.Popen, rng: random.Random, seconds: float) -> None:
    """Mostly while it trains or saves; one time in five, while it starts."""
    if rng.random() < 0.2:
        time.sleep(rng.uniform(0, 3))
    else:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(("Resuming", "No complete checkpoint")):
                break
        time.sleep(rng.uniform(0, seconds))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed: give it more steps"


def assert_killed_runs_end_alike(tmp_path: Path, num_kills: int, num_steps: int, seconds: float) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps = f"train.steps={num_steps}"
    assert run_cli("train", "debug", *LONG, steps, "--out", whole) == 0
    rng = random.Random(0)
    written = b""
    for _ in range(num_kills):
        kill_at_random(start(killed, steps, "--resume"), rng, seconds)
        if (killed / "metrics.jsonl").exists():
            now = (killed / "metrics.jsonl").read_bytes()
            assert now.startswith(written)  # nothing is ever taken out
            written = now
            for _, line in lines_that_count(written[: written.rfind(b"\n") + 1]):
                assert not line or json.loads(line)
    process = start(killed, steps, "--resume")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert_same(final_state(killed, num_steps), final_state(whole, num_steps))
    assert metrics_of(killed) == metrics_of(whole)


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    assert_killed_runs_end_alike(tmp_path, num_kills=4, num_steps=200, seconds=0.3)


@pytest.mark.slow
def test_a_run_killed_fifty_times_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    assert_killed_runs_end_alike(tmp_path, num_kills=50, num_steps=2000, seconds=0.8)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_exits_130(number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out)
    wait_for_metrics(out, 20, process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "continue with --resume" in stderr
    last = checkpoint.newest(out / "checkpoints", pytest.fail)
    assert last is not None
    assert checkpoint.step_of(last) == metrics_of(out)[-1]["step"]
    assert "Traceback" not in stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_exits_130(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, arguments = tmp_path / "run", ["train", "debug", "train.steps=2", "log.tensorboard=false", "eval.examples=2"]
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "warm_up", lambda trainer: signal.raise_signal(number))
        patch.setattr(Trainer, "choose_attention", lambda trainer, known: None)
        patch.setattr("unmask.training.trainer.should_compile", lambda setting, device: True)
        patch.setattr(Denoiser, "compile_training", lambda model, **_k: None)
        assert run_cli(*arguments, "--out", out) == 130
    assert "start again with --resume" in capsys.readouterr().err
    assert run_cli(*arguments, "--out", out, "--resume") == 0
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == handlers


def test_another_environment_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    settings = ["train.steps=2", "log.tensorboard=false", "eval.examples=2"]
    assert run_cli("train", "debug", *settings, "--out", out) == 0
    environment = json.loads((out / "environment.json").read_text())
    (out / "environment.json").write_text(json.dumps(environment | {"cpu": "abacus", "torch": "0.1"}))
    capsys.readouterr()
    assert run_cli("train", "debug", *settings, "train.steps=3", "--out", out, "--resume") == 0
    assert "cpu was 'abacus'" in capsys.readouterr().err


def peak_bytes(process: subprocess.Popen) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


@pytest.mark.slow
def test_memory_does_not_grow_over_ten_thousand_steps(tmp_path: Path) -> None:
    """With checkpoints, evaluations, TensorBoard and log lines, as in a long run."""
    out = tmp_path / "run"
    settings = [
        *("task.name=toy", "model.dim=8", "model.num_layers=1", "model.num_heads=1", "train.batch_size=4"),
        *("train.steps=10000", "train.checkpoint_every=50", "log.every=10", "log.tensorboard=true"),
        *("eval.every=500", "eval.examples=4", "eval.tokens_per_step=[2]"),
    ]
    process = start(out, *settings)
    threading.Thread(target=process.stderr.read, daemon=True).start()
    wait_for_metrics(out, 200, process, seconds=600)  # of some 1020
    early = peak_bytes(process)
    wait_for_metrics(out, 1000, process, seconds=600)
    late = peak_bytes(process)
    assert process.wait(timeout=120) == 0
    assert late - early < 6e6, f"{early} bytes after 2,000 steps, {late} after 10,000"
