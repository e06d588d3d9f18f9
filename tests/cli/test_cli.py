"""The command line as a user types it. In-process, but for the tests that are about processes."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml

import unmask
from tests.helpers import SHORT, lines, run_cli
from tests.helpers.sudoku import EASY, EASY_SOLUTION
from unmask.decoding.config import DecodeConfig
from unmask.training.loading import LoadedRun


def test_a_run_folder_has_what_it_should(run: Path) -> None:
    assert {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints"} <= {path.name for path in run.iterdir()}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["process"] == {
        "name": "puma",
        "num_stages": 4,
        "stage_schedule": [],
        "time": {"name": "uniform"},
        "threshold": 0.9,
        "factor": None,
        "entropy_bound": None,
        "budget": None,
        "start": None,
        "run": None,
        "order": "prob",
        "block_size": None,
    }
    environment = json.loads((run / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    rows = lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4]
    for row in rows:
        assert list(row)[:3] == ["step", "seconds", "examples_seen"]
    assert {"train/loss", "train/grad_norm", "train/lr", "puma/num_stages"} <= rows[0].keys()
    evaluation = rows[-1]
    assert {"eval/nelbo", "eval/nelbo_stderr", "eval/accuracy"} <= evaluation.keys()
    for weights in ("ema", "raw"):
        assert {f"eval/accuracy/{weights}/prob/{tokens}" for tokens in (1, 3)} <= evaluation.keys()


def test_eval_prints_one_json_object(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--decoder",
        "margin,tokens_per_step=9",
        "--decoder",
        "random,steps=3,temperature=0.5",
        "--examples",
        "5",
        "--json",
    ]
    assert run_cli("eval", run, *arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["accuracy"]) == ["margin/9", "random/steps3/T0.5"]
    assert result["nelbo"] > 0
    assert result["nelbo_stderr"] > 0
    assert result["nfe"]["random/steps3/T0.5"] == 3
    assert result["protocol"]["weights"] == "ema"
    assert result["protocol"]["step"] == 4
    assert result["protocol"]["examples"] == 5


def test_eval_is_what_training_logged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = lines(run / "metrics.jsonl")[-1]
    for weights in ("ema", "raw"):
        assert run_cli("eval", run, "--weights", weights, "--json") == 0
        result = json.loads(capsys.readouterr().out)
        assert result["nelbo"] == pytest.approx(evaluation[f"eval/nelbo/{weights}"], rel=1e-6)


@pytest.mark.parametrize("impossible", ["margin,loops=2", "margin,cache=block"])
def test_eval_refuses_a_decoder_before_it_evaluates(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, impossible: str
) -> None:
    monkeypatch.setattr("unmask.models.denoiser.Denoiser.hidden", pytest.fail)
    monkeypatch.setattr("unmask.models.denoiser.Denoiser.forward", pytest.fail)
    assert run_cli("eval", run, "--decoder", "prob", "--decoder", impossible) == 2
    assert "decode." in capsys.readouterr().err
    assert run_cli("eval", run, "--decoder", "prob", "--decoder", impossible, "--against", run) == 2


def test_it_is_said_where_nothing_is_compiled(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = LoadedRun.open(run)
    loaded.prepare(DecodeConfig(compile=True))
    assert capsys.readouterr().err == ""
    loaded.prepare(DecodeConfig(compile=True, cache="dual", block_size=9))
    assert "without effect: decode.compile=true (decode.cache=dual" in capsys.readouterr().err


def test_eval_in_another_dtype(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nelbo = {}
    for dtype in ("float32", "float64", "bfloat16"):
        assert run_cli("eval", run, "--examples", "3", "--decoder", f"prob,dtype={dtype}", "--json") == 0
        result = json.loads(capsys.readouterr().out)
        assert result["protocol"]["dtype"] == dtype
        nelbo[dtype] = result["nelbo"]
    assert len(set(nelbo.values())) == 3
    assert nelbo["float32"] == pytest.approx(nelbo["float64"], rel=1e-5)
    assert nelbo["bfloat16"] == pytest.approx(nelbo["float64"], rel=0.05)  # 8 bits of mantissa


def test_eval_prints_a_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("eval", run, "--step", "2", "--examples", "3") == 0
    out = capsys.readouterr().out
    assert "step 2" in out
    assert "prob/1" in out
    assert "NELBO" in out


def test_eval_on_a_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f"puzzle,solution\n{EASY},{EASY_SOLUTION}\n")
    assert run_cli("eval", run, "--data", path, "--json") == 0
    protocol = json.loads(capsys.readouterr().out)["protocol"]
    assert protocol["data"] == str(path)
    assert protocol["examples"] == 1


def test_decode_then_grade(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    puzzles, out = tmp_path / "puzzles.txt", tmp_path / "new" / "answers.jsonl"
    puzzles.write_text(f"{EASY}\n\n{EASY.replace('0', '.')}\n")
    assert run_cli("decode", run, puzzles, "--out", out, "--decoder", "prob,tokens_per_step=3") == 0
    records = lines(out)
    assert [record["puzzle"] for record in records] == [EASY, EASY]
    assert records[0]["nfe"] == 17
    assert records[0]["answer"] == records[1]["answer"]
    capsys.readouterr()
    assert run_cli("grade", out, "--task", "sudoku", "--json") == 0
    grade = json.loads(capsys.readouterr().out)
    assert grade["n"] == 2
    assert grade["correct"] == sum(record["solved"] for record in records)
    assert sum(grade["reasons"].values()) == 2 - grade["correct"]
    assert run_cli("grade", out, "--task", "sudoku") == 0
    assert "of 2 right" in capsys.readouterr().out


def test_decode_from_stdin_and_watch(run: Path) -> None:
    command = [sys.executable, "-m", "unmask", "decode", str(run), "--watch", "--decoder", "margin,tokens_per_step=20"]
    done = subprocess.run(command, input=f"{EASY}\n", capture_output=True, text=True, check=True)
    record = json.loads(done.stdout)
    assert record["puzzle"] == EASY
    assert "│" in done.stderr


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_export_and_load(run: Path, tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "model"
    assert run_cli("export", run, target, "--weights", weights) == 0
    ours, theirs = {"model.safetensors", "config.json"}, {"modeling_unmask.py", "generation_config.json", "README.md"}
    assert {path.name for path in target.iterdir()} == ours | theirs
    exported, original = unmask.load(target), unmask.load(run, weights=weights)
    for (name, one), other in zip(exported.named_parameters(), original.parameters(), strict=True):
        assert torch.equal(one, other), name
    xt = torch.full((1, 81), 10)
    assert torch.equal(exported.logits(xt, torch.arange(81)), original.logits(xt, torch.arange(81)))
    capsys.readouterr()
    assert run_cli("eval", target, "--examples", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["protocol"]["weights"] == weights


def test_ema_and_raw_differ(run: Path) -> None:
    ema, raw = (unmask.load(run, weights=name).state_dict() for name in ("ema", "raw"))
    assert any(not torch.equal(ema[name], raw[name]) for name in ema)


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("bench", "step", "debug", "--count", "2", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert {
        "seconds_per_step",
        "examples_per_second",
        "peak_rss_bytes",
        "process_share",
        "compile_seconds",
    } <= result.keys()
    assert 0 < result["process_share"] < 1
    hashes = []
    for seed in (0, 0, 1):
        assert run_cli("bench", "decode", "debug", "--rows", "2", f"train.seed={seed}", "--json") == 0
        result = json.loads(capsys.readouterr().out)
        hashes.append(result["tokens_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]
    assert {"seconds", "nfe", "tokens_per_second", "peak_rss_bytes"} <= result.keys()


def test_memory_does_not_grow() -> None:
    command = [sys.executable, "-m", "unmask", "bench", "memory", "debug", "--count", "300", "--json"]
    # In a process of its own: the peak of this one hides what comes after it.
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert result["steps"] == 300
    assert result["growth_bytes"] < 5 * 2**20  # a batch leaked each step, 20 kB, would come to this


def test_warm_start_begins_with_the_other_runs_weights(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "warm"
    settings = ["train.steps=1", "optim.lr=1e-12", "optim.weight_decay=0", f"train.init={run}"]
    assert run_cli("train", "debug", *SHORT, *settings, "--out", out) == 0
    for one, other in zip(unmask.load(out, weights="raw").parameters(), unmask.load(run).parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-9)


def test_extending_a_finished_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run_cli("train", "debug", *SHORT, "--out", out) == 0
    assert run_cli("train", "debug", *SHORT, "train.steps=6", "--out", out, "--resume") == 0
    assert max(row["step"] for row in lines(out / "metrics.jsonl")) == 6


def test_resume_without_a_run_starts_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("train", "debug", *SHORT, "--out", tmp_path / "run", "--resume") == 0
    assert "starting at step 0" in capsys.readouterr().err


def test_resume_does_not_start_over_what_has_only_damaged_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run_cli("train", "debug", *SHORT, "--out", out) == 0
    for state in out.glob("checkpoints/*/state.json"):
        state.write_text("{}")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run_cli("train", "debug", *SHORT, "--out", out, "--resume") == 2
    assert "no checkpoint is whole (of steps" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("--version") == 0
    assert capsys.readouterr().out == f"unmask {metadata.version('unmask')}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["train"], ["eval"], ["decode"], ["chat"], ["grade"], ["export"], ["bench"], ["bench", "step"]]
)
def test_help_teaches(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(*arguments, "--help") == 0
    out = capsys.readouterr().out
    assert "unmask" in out
    assert arguments in ([], ["bench"]) or "Example" in out
