"""Runs that an older version has written go on as they would have there, and say the same.

`tests/fixtures/runs_2026_11` holds the runs (its README says how they were made) and, in `expected.json` of each, what
the version that wrote them went on to do. All goes through the command line, as it does for who has such a run.
"""

import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import unmask
from tests.helpers import lines, metrics_of, run_cli
from unmask.config import recipes
from unmask.training.folder import read_config, to_yaml

RUNS = Path(__file__).parents[1] / "fixtures" / "runs_2026_11"
NAMES = ["puma", "uniform"]
WEIGHTS = ["ema", "raw"]
DECODERS = {  # the key `confidence` too stays one of the command line
    "as configured": [],
    "prob": ["--decoder", "confidence=prob,tokens_per_step=9"],
    "threshold": ["--decoder", "margin,threshold=0.3"],
}
COUNTS = ("step", "examples_seen", "train/scored_per_row", "puma/num_stages", "puma/revealed_per_row")
PUZZLES = RUNS / "puzzles.txt"


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def run(name: str, tmp_path: Path) -> Path:
    return copied(name, tmp_path)


@pytest.fixture
def expected(name: str) -> dict[str, Any]:
    return json.loads((RUNS / name / "expected.json").read_text())


def copied(name: str, to: Path) -> Path:
    return shutil.copytree(RUNS / name, to / name, ignore=shutil.ignore_patterns("expected.json"))


def printed(*arguments: object) -> dict[str, Any]:
    """Returns the JSON that a verb prints."""
    with redirect_stdout(io.StringIO()) as out:
        assert run_cli(*arguments, "--json") == 0
    return json.loads(out.getvalue())


def resumed(run: Path) -> list[dict[str, Any]]:
    """Trains steps 7 to 12, with the settings that the run folder holds; returns their metrics."""
    assert run_cli("train", run / "config.yaml", "train.steps=12", "--out", run, "--resume") == 0
    return [row for row in metrics_of(run) if row["step"] > 6]


def decoded(run: Path, *options: object) -> list[dict[str, Any]]:
    """Returns tokens and forward passes for each puzzle."""
    answers = run.parent / "answers.jsonl"
    assert run_cli("decode", run, PUZZLES, "--out", answers, *options) == 0
    found = [{"nfe": line["nfe"], "tokens": line["tokens"]} for line in lines(answers)]
    answers.unlink()
    return found


def all_decoded(run: Path) -> dict[str, dict[str, Any]]:
    return {
        weights: {label: decoded(run, *options, "--weights", weights) for label, options in DECODERS.items()}
        for weights in WEIGHTS
    }


def evaluated(run: Path) -> dict[str, dict[str, Any]]:
    found = {weights: printed("eval", run, "--weights", weights) for weights in WEIGHTS}
    return {weights: {key: row[key] for key in ("nelbo", "shares", "nfe")} for weights, row in found.items()}


def assert_alike(found: Any, expected: Any) -> None:
    """Numbers agree to fp32 rounding, which Adam's steps enlarge, by kernels of other CPUs and versions of torch."""
    if isinstance(expected, dict):
        assert found.keys() >= expected.keys()
        for key, value in expected.items():
            assert_alike(found[key], value)
    else:
        assert found == pytest.approx(expected, rel=2e-4)


def test_resumed_training_goes_on_the_same(run: Path, expected: dict[str, Any]) -> None:
    rows = resumed(run)
    assert [[row.get(key) for key in COUNTS] for row in rows] == [
        [row.get(key) for key in COUNTS] for row in expected["resumed"]
    ]
    for row, other in zip(rows, expected["resumed"], strict=True):
        assert_alike(row, other)


def test_answers_are_the_same(run: Path, expected: dict[str, Any]) -> None:
    assert all_decoded(run) == expected["decoded"]


def test_evaluation_is_the_same(run: Path, expected: dict[str, Any]) -> None:
    assert_alike(evaluated(run), expected["evaluated"])


def test_settings_are_read(run: Path, name: str) -> None:
    settings = {key: row["value"] for key, row in printed("settings", run).items()}
    order, of_process = {"puma": ("margin", ["margin"]), "uniform": ("neg_entropy", [])}[name]
    # under whichever key: config.yaml says `confidence`
    assert [settings[key] for key in ("decode.confidence", "decode.order") if key in settings] == [order]
    assert [settings[key] for key in ("process.confidence", "process.order") if key in settings] == of_process
    assert settings["process.name"] == name
    assert settings["train.steps"] == 6
    assert settings["train.dtype"] == "float32"


def test_a_new_run_starts_from_its_weights(run: Path, tmp_path: Path) -> None:
    few = ["train.steps=1", f"train.init={run}", "eval.every=1"]
    assert run_cli("train", run / "config.yaml", *few, "--out", tmp_path / "warm") == 0
    assert metrics_of(tmp_path / "warm")[0]["step"] == 1


def test_an_export_answers_the_same(run: Path, expected: dict[str, Any]) -> None:
    assert run_cli("export", run, run.parent / "export") == 0
    assert decoded(run.parent / "export") == expected["decoded"]["ema"]["as configured"]


def test_an_older_export_answers_the_same(tmp_path: Path) -> None:
    expected = json.loads((RUNS / "puma" / "expected.json").read_text())
    export = shutil.copytree(RUNS / "export", tmp_path / "export")
    assert decoded(export) == expected["decoded"]["ema"]["as configured"]
    assert printed("eval", export)["nelbo"] == pytest.approx(expected["evaluated"]["ema"]["nelbo"], rel=2e-4)
    num_stored = sum(tensor.numel() for tensor in load_file(export / "model.safetensors").values())
    assert sum(parameter.numel() for parameter in unmask.load(export).parameters()) == num_stored


if __name__ == "__main__":
    for each in NAMES:
        with TemporaryDirectory() as folder:
            here = copied(each, Path(folder))
            found = {"decoded": all_decoded(here), "evaluated": evaluated(here), "resumed": resumed(here)}
        (RUNS / each / "expected.json").write_text(json.dumps(found) + "\n")


def test_settings_that_look_like_numbers_are_what_they_were(tmp_path: Path) -> None:
    """PyYAML, which wrote them, leaves text unquoted that later YAML takes for numbers."""
    config = recipes.load("debug").model_dump(mode="json")
    config["log"]["project"], config["train"]["init"], config["data"]["cache_dir"] = "1e3", "08", "0o17"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert "project: 1e3\n" in (tmp_path / "config.yaml").read_text()
    assert read_config(tmp_path).model_dump(mode="json") == config
    (tmp_path / "config.yaml").write_text(to_yaml(read_config(tmp_path)))
    assert read_config(tmp_path).model_dump(mode="json") == config
    assert recipes.load(str(tmp_path / "config.yaml")).log.project == "1e3"
