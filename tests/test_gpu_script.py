"""`benchmarks/gpu.py`: what it does when time runs out, and its count of operations."""

import importlib.util
import os
import signal
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from unmask.config import recipes
from unmask.masking.process import masked_batch
from unmask.models.build import build_denoiser
from unmask.tasks.task import build_task

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_script"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def call(gpu: ModuleType, out: Path, *, seconds: float, reserve: float = 0.0) -> object:
    return gpu.Call(out, True, time.monotonic() + seconds, reserve, {})


def test_a_part_that_takes_too_long_is_ended_with_what_it_started(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "SAVING", 0.1)
    one = call(gpu, tmp_path, seconds=60)
    assert one.run("part", ["sh", "-c", f"(sleep 3; touch {tmp_path / 'late'}) & wait"], most=0.5) is None
    time.sleep(3)
    assert one.has_failed
    assert not (tmp_path / "late").exists()


def test_what_the_time_does_not_allow_is_left_to_another_call(gpu: ModuleType, tmp_path: Path) -> None:
    one = call(gpu, tmp_path, seconds=60, reserve=50)
    assert one.run("part", ["touch", str(tmp_path / "made")], most=100) is None
    assert not one.has_failed
    assert not (tmp_path / "made").exists()


def test_tests_that_fail_are_named_and_not_run_again(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "F.\\nFAILED tests/a.py::test_b[1] - assert 0\\n1 failed, 1 passed in 2s"
    monkeypatch.setattr(gpu, "python", lambda *_: ["sh", "-c", f"printf '{said}'; exit 1"])
    one = call(gpu, tmp_path, seconds=200)
    one.found["machine"] = {"device": "none", "product_flops": 1.0, "torch": "2", "cpus": 1}
    gpu.test(one)
    assert one.has_failed
    assert one.found["tests"] == "1 failed, 1 passed in 2s; FAILED tests/a.py::test_b[1]"
    monkeypatch.setattr(gpu, "python", lambda *_: ["touch", str(tmp_path / "again")])
    gpu.test(one)
    assert not (tmp_path / "again").exists()


def test_tests_that_did_not_run_are_no_result(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "python", lambda *_: ["sh", "-c", "echo No module named pytest; exit 1"])
    one = call(gpu, tmp_path, seconds=200)
    gpu.test(one)
    assert one.has_failed
    assert "tests" not in one.found


def test_what_is_no_results_file_is_left_alone(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out"), "--results", str(tmp_path / "mine")])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "is no file of results; name another" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_results_hold_what_is_small_however_the_call_ends(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for name in ("summary.md", "paper_puma.log", "paper_puma/metrics.jsonl", "paper_puma/checkpoints/step_1/x.json"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)

    def stop(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(gpu, "do", stop)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out), "--results", str(tmp_path / "r" / "all.tar.gz")])
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGHUP)]
    try:
        with pytest.raises(SystemExit):
            gpu.main()
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    with tarfile.open(tmp_path / "r" / "all.tar.gz") as packed:
        assert sorted(packed.getnames()) == ["paper_puma.log", "paper_puma/metrics.jsonl", "summary.md"]


@pytest.mark.parametrize("scored", [162, 40])
def test_operations_are_about_those_that_torch_counts(gpu: ModuleType, scored: int) -> None:
    settings = [*gpu.SMALL, "model.qkv_bias=false", "model.out_bias=false"]
    config = recipes.load("sudoku/paper_uniform", [*settings, "data.puzzles=8", "model.attention=matmul"])
    task = build_task(config)
    model = build_denoiser(config.model, task.tokens, seed=0, dtype="float32", device=torch.device("cpu"))
    x0 = torch.ones(config.train.batch_size, task.tokens.length, dtype=torch.int64)
    xt = x0.masked_fill(torch.arange(x0.shape[1]) < scored, task.tokens.mask_id)
    batch = masked_batch(x0, xt, task.tokens.mask_id, torch.ones(len(x0)))
    with FlopCounterMode(display=False) as counter:
        model(batch).nll.sum().backward()
    counted = gpu.rates("sudoku/paper_uniform", settings, 1.0, scored)["flops"]
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.1)  # those of the loss are not counted
