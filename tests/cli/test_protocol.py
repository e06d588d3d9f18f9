"""`unmask eval --protocol`: an evaluation is repeated from what it said of itself, and what differs is named."""

import json
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import run_cli
from tests.helpers.runs import tiny_run
from unmask.errors import UserError
from unmask.training.loading import LoadedRun
from unmask.training.protocol import EvalOptions, Repeated

DECODERS = ["--decoder", "margin,tokens_per_step=9", "--decoder", "random,seed=3,tokens_per_step=20"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("protocol") / "run"
    tiny_run(folder, "train.steps=2", "train.keep_last=2").train()
    return folder


@pytest.fixture(scope="module")
def first(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of an evaluation of an earlier step."""
    file = tmp_path_factory.mktemp("first") / "result.json"
    with redirect_stdout(StringIO()) as printed:
        assert run_cli("eval", run, "--step", 1, "--examples", 4, *DECODERS, "--json") == 0
    file.write_text(printed.getvalue())
    return file


def repeat(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert run_cli("eval", *arguments, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_an_evaluation_repeats_itself(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same figures, from the same checkpoint, decoders and examples, though none of them is given."""
    before = json.loads(first.read_text())
    after = repeat(capsys, "--protocol", first)
    assert after["repeats"]["differs"] == {}
    assert {key: after[key] for key in before} == before
    assert after["repeats"]["figures"]["nelbo"] == [before["nelbo"]] * 2
    assert after["protocol"]["step"] == 1
    assert run_cli("eval", "--protocol", first) == 0
    shown = capsys.readouterr().out
    assert f"Repeats {first}, with nothing changed." in " ".join(shown.split())
    assert "accuracy.margin/9" in shown


def test_the_protocol_alone_is_enough(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "protocol.json").write_text(json.dumps(json.loads(first.read_text())["protocol"]))
    found = repeat(capsys, "--protocol", tmp_path / "protocol.json")["repeats"]
    assert found["differs"] == found["figures"] == {}


def test_what_differs_is_named(run: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another step of the run, and other versions than in the file."""
    edited = json.loads(first.read_text())
    edited["protocol"]["versions"]["torch"] = "1.0"
    (tmp_path / "edited.json").write_text(json.dumps(edited))
    differs = repeat(capsys, run, "--protocol", tmp_path / "edited.json", "--step", 2)["repeats"]["differs"]
    assert differs.keys() == {"step", "weights_sha256", "versions.torch"}
    assert differs["step"] == [1, 2]
    assert differs["versions.torch"][0] == "1.0"


def test_an_older_result_has_a_digest_of_another_kind(
    run: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is compared with one of its kind: of fp32, without `v2-`."""
    older = json.loads(first.read_text())
    assert older["protocol"]["weights_sha256"].startswith("v2-")
    old = LoadedRun.open(run, step="1").weights_digest(like="0" * 64)
    older["protocol"]["weights_sha256"] = old
    (tmp_path / "older.json").write_text(json.dumps(older))
    same = repeat(capsys, "--protocol", tmp_path / "older.json")
    assert same["repeats"]["differs"] == {}
    differs = repeat(capsys, run, "--protocol", tmp_path / "older.json", "--step", 2)["repeats"]["differs"]
    assert differs["weights_sha256"][0] == old
    assert len(differs["weights_sha256"][1]) == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: said.pop("options"), "options"),
        (lambda said: said["options"].update(decode="x"), "options.decode"),
        (lambda said: said["options"].update(examples=0), "options.examples"),
        (lambda said: said.pop("weights_sha256"), "is no protocol"),
    ],
)
def test_a_file_that_is_no_protocol(
    change: Any, message: str, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = json.loads(first.read_text())["protocol"]
    change(said)
    (tmp_path / "bad.json").write_text(json.dumps(said))
    assert run_cli("eval", "--protocol", tmp_path / "bad.json") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "bad.json" in error


def test_what_a_protocol_decides_is_not_given_again(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("eval", "--protocol", first, "--examples", 2, "--decoder", "prob") == 2
    assert "--decoder, --examples" in capsys.readouterr().err
    assert run_cli("eval") == 2
    assert "RUN is missing" in capsys.readouterr().err


def test_an_export_of_the_run_has_the_same_weights(
    run: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The digest is of the tensors, not of the files that hold them; other weights have another."""
    assert run_cli("export", run, tmp_path / "same", "--step", 1) == 0
    assert run_cli("export", run, tmp_path / "other", "--step", 1, "--dtype", "bfloat16") == 0
    assert repeat(capsys, tmp_path / "same", "--protocol", first)["repeats"]["differs"] == {}
    differs = repeat(capsys, tmp_path / "other", "--protocol", first)["repeats"]["differs"]
    assert differs.keys() == {"weights_sha256"}


def test_of_an_export_no_step_is_chosen(
    run: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's protocol names step and weights; what holds one set of weights is evaluated with these, which is said."""
    assert run_cli("export", run, tmp_path / "later", "--step", 2) == 0
    assert repeat(capsys, tmp_path / "later", "--protocol", first)["repeats"]["differs"].keys() == {
        "step",
        "weights_sha256",
    }
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    repeated = Repeated.read(first)
    asked = repeated.with_places(EvalOptions(run=str(tmp_path / "hf")))
    assert (asked.step, asked.weights) == ("last", None)
    asked = repeated.with_places(EvalOptions(run=str(run)))
    assert (asked.step, asked.weights) == ("1", "ema")


def test_another_task_is_refused_in_a_line(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_run(tmp_path / "sums", "task.name=addition", "data={}", "train.steps=1").train()
    capsys.readouterr()
    assert run_cli("eval", tmp_path / "sums", "--protocol", first) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "is of the task toy, and this model is for addition; give a model for toy" in error


@pytest.mark.parametrize(
    ("then", "now", "is_same"),
    [("text", "pretrained", True), ("pretrained", "text", True), ("text", "chat", False), ("mine:Task", "toy", False)],
)
def test_tasks_that_read_alike(then: str, now: str, is_same: bool, first: Path) -> None:
    """A model that came from elsewhere reads text as a run of text does. Another's code is not looked for."""
    repeated = replace(Repeated.read(first), protocol={"task": then})
    with nullcontext() if is_same else pytest.raises(UserError, match=f"is of the task {then}"):
        repeated.check_task(now)
