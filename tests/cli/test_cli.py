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
from unmask.cli import options
from unmask.config import recipes
from unmask.config.run import EvalConfig
from unmask.decoding.config import DecodeConfig
from unmask.errors import UserError


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


def test_every_recipe_loads_and_its_methods_differ_in_the_process_alone() -> None:
    for name in recipes.names():
        assert recipes.load(name).train.batch_size > 0
    for baseline in ("sudoku/", "sudoku/paper_", "sudoku/block_", "tinygsm/block_"):
        pair = (f"{baseline}uniform", f"{baseline}puma")
        one, other = (recipes.load(name).model_dump() for name in pair)
        assert [section for section in one if one[section] != other[section]] == ["process"]


@pytest.mark.parametrize(
    ("section", "given", "said"),
    [
        ("process", "{confidence: margin, order: prob}", "confidence='margin' and order='prob'"),
        ("process", "{confidence: margin, alg: prob}", "confidence='margin' and alg='prob'"),
        ("decode", "{order: margin, confidence: prob}", "order='margin' and confidence='prob'"),
        ("eval", "{orders: [prob], confidences: [margin]}", "orders=['prob'] and confidences=['margin']"),
    ],
)
def test_two_names_of_one_setting_are_the_users_mistake(
    section: str, given: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"extends: sudoku/puma\n{section}: {given}\n")
    assert run_cli("settings", mine) == 2
    assert f"{section}: {said} are one setting; give order" in " ".join(capsys.readouterr().err.split())


def test_a_setting_is_listed_under_its_other_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("settings", "debug", "decode.confidence", "eval.confidences", "process.alg=margin", "--json") == 0
    assert list(json.loads(capsys.readouterr().out)) == ["decode.order", "eval.orders"]
    assert run_cli("settings", "debug", "decod.confidence", "steps.x") == 2


def test_two_names_of_one_setting_of_a_decoder() -> None:
    for text in ("margin,confidence=prob", "alg=prob,confidence=margin", "order=prob,alg=margin"):
        with pytest.raises(UserError, match=rf"^--decoder {text}: decode: .* are one setting; give order alone"):
            options.parse_decoder(text, DecodeConfig())
    assert options.parse_decoder("confidence=margin", DecodeConfig(order="prob")).order == "margin"


def test_names_that_users_of_other_code_bring() -> None:
    settings = [
        "process.K=5",
        "process.block_length=27",
        "process.confidence_threshold=0.7",
        "process.confidence=low_confidence",
        "decode.unmasking_num=3",
        "decode.block_length=9",
        "decode.alg=maskgit_plus",
    ]
    config = recipes.load("sudoku/puma", settings)
    assert config.process.model_dump() == {
        "name": "puma",
        "num_stages": 5,
        "stage_schedule": [],
        "time": {"name": "uniform"},
        "threshold": 0.7,
        "factor": None,
        "entropy_bound": None,
        "budget": None,
        "start": None,
        "run": None,
        "order": "prob",
        "block_size": 27,
    }
    assert config.model.model_dump()["block_size"] == 27  # a model is told what its process asks
    assert config.decode.label == "prob/3/block9"
    assert recipes.load("tinygsm/puma", ["decode.cfg_scale=1.5", "data.prompt_dropout=0.1"]).decode.guidance == 1.5
    assert recipes.load("debug", ["decode.confidence=top_k_margin"]).decode.order == "margin"


def test_the_later_of_two_alternatives_counts(tmp_path: Path) -> None:
    assert recipes.load("sudoku/uniform", ["train.epochs=2"]).train.steps is None
    assert recipes.load("sudoku/paper_puma", ["train.steps=7"]).train.epochs is None
    (tmp_path / "mine.yaml").write_text("extends: sudoku/puma\ndecode: {steps: 5}\n")
    assert recipes.load(str(tmp_path / "mine.yaml")).decode.label == "prob/steps5"
    assert recipes.load(str(tmp_path / "mine.yaml"), ["decode.unmasking_num=2"]).decode.label == "prob/2"
    process = recipes.load("sudoku/puma", ["process.factor=1"]).process
    assert (process.threshold, process.factor, process.num_stages) == (None, 1.0, 8)
    process = recipes.load("debug", ["process={name: puma_variable, factor: 1}"]).process  # 0.9 by default
    assert (process.threshold, process.factor) == (None, 1.0)
    process = recipes.load("debug", ["process={name: puma_variable, threshold: null}"]).process
    assert process.threshold is None


def test_decoders_take_the_same_names_and_alternatives() -> None:
    base = DecodeConfig(steps=5)
    assert options.parse_decoder("low_confidence,unmasking_num=3", base).label == "prob/3"
    assert options.parse_decoder("margin", base).label == "margin/steps5"
    assert options.parse_decoder("random,seed=2", DecodeConfig()).label == "random/1/seed2"
    for key in ("threshold=0.9", "factor=1.5", "entropy_bound=0.1"):
        assert options.parse_decoder(f"prob,{key}", base).steps is None
        assert options.parse_decoder("prob,steps=2", options.parse_decoder(f"prob,{key}", base)).label == "prob/steps2"


def test_what_goes_with_steps_goes_with_them() -> None:
    base = DecodeConfig(steps=5, schedule="cosine", remask="p2", remask_eta=0.5, block_size=None)
    assert options.parse_decoder("prob,steps=9", base).label == "prob/steps9/cosine/p2/eta0.5"
    assert options.parse_decoder("prob,threshold=0.9", base).label == "prob/threshold0.9"
    grid = EvalConfig(tokens_per_step=[1, 2]).decoders(base.model_copy(update={"seed": 4}))
    assert [decoder.label for decoder in grid] == ["prob/1/seed4", "prob/2/seed4"]
    assert grid == [DecodeConfig.model_validate(decoder.model_dump()) for decoder in grid]  # nothing impossible


MINE = """
from unmask.masking.puma import PumaPool

class Mine(PumaPool):
    def metrics(self):
        return super().metrics() | {"mine": 1.0}
"""


def test_a_process_of_ones_own_from_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "my_process.py").write_text(MINE)
    command = [sys.executable, "-c", "from unmask.cli import run; run()", "train", "debug", *SHORT, "--out", "run"]
    command += ["process={name: 'my_process:Mine', num_stages: 3}"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert lines(tmp_path / "run" / "metrics.jsonl")[0]["mine"] == 1.0
    assert lines(tmp_path / "run" / "metrics.jsonl")[0]["puma/num_stages"] == 3


def test_another_process_starts_its_section_afresh() -> None:
    assert recipes.load("sudoku/puma", ["process.name=uniform"]).process.model_dump() == {
        "name": "uniform",
        "time": {"name": "uniform"},
        "weight": "per_masked",
        "weight_cap": None,
        "masking": "exact",
        "block_size": None,
    }


OPTIM = {"optim.name": "muon", "optim.muon_lr": 2.0, "optim.schedule": "wsd", "optim.decay_share": 0.5}


@pytest.mark.parametrize("keys", [["optim.name"], [*OPTIM], [*reversed(OPTIM)]])
def test_another_optimizer_leaves_its_section_as_it_is(keys: list[str], tmp_path: Path) -> None:
    given = {key: OPTIM[key] for key in keys}
    expected = recipes.load("sudoku/puma").model_dump()
    expected["optim"] |= {key.removeprefix("optim."): value for key, value in given.items()}
    assert recipes.load("sudoku/puma", [f"{key}={value}" for key, value in given.items()]).model_dump() == expected
    changed = ", ".join(f"{key.removeprefix('optim.')}: {value}" for key, value in given.items())
    (tmp_path / "mine.yaml").write_text(f"extends: sudoku/puma\noptim: {{{changed}}}\n")
    (tmp_path / "longer.yaml").write_text("extends: mine.yaml\noptim: {warmup_steps: 3}\n")
    assert recipes.load(str(tmp_path / "mine.yaml")).model_dump() == expected
    expected["optim"]["warmup_steps"] = 3
    assert recipes.load(str(tmp_path / "longer.yaml")).model_dump() == expected


def test_to_name_the_component_that_is_there_changes_nothing(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"  # no section has a name: they are those of the defaults
    mine.write_text("process: {block_size: 9}\nmodel: {preset: tiny, dropout: 0.1}\ntrain: {steps: 5}\n")
    same = ["model.name=transformer", "process.name=uniform", "task.name=sudoku"]
    assert recipes.load(str(mine), same) == recipes.load(str(mine))


@pytest.mark.parametrize(
    ("override", "time"),
    [
        ("process.time.name=beta", "{name: beta}"),
        ("process.time={name: beta, a: 4}", "{name: beta, a: 4}"),
        ("process.time.of.name=clipped", "{name: mixture, uniform: 0.5, of: {name: clipped}}"),
        ("process.time.of.a=4", "{name: mixture, uniform: 0.5, of: {name: beta, a: 4, b: 7}}"),
    ],
)
def test_another_density_starts_its_section_afresh(override: str, time: str) -> None:
    mixture = "process.time={name: mixture, uniform: 0.5, of: {name: beta, a: 2, b: 7}}"
    found = recipes.load("sudoku/uniform", [mixture, override])
    assert found == recipes.load("sudoku/uniform", [f"process.time={time}"])


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("task: {name: toy}\nmodel: {preset: tiny}\ntrain: {steps: 5, batch_size: 8}\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nprocess: {name: puma, K: 3}\ntrain: {steps: 2}\n")
    config = recipes.load(str(tmp_path / "mine.yaml"), ["train.seed=4"])
    assert (config.train.steps, config.train.batch_size, config.train.seed) == (2, 8, 4)
    assert config.process.model_dump()["num_stages"] == 3


def test_a_recipe_may_extend_a_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: sudoku/puma\ntrain: {steps: 2}\n")
    config = recipes.load(str(tmp_path / "mine.yaml"))
    assert config.process == recipes.load("sudoku/puma").process
    assert config.train.steps == 2
