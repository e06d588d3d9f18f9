"""`unmask eval --protocol`: an evaluation is repeated from what it said of itself, and what differs is named."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import run_cli
from tests.helpers.runs import tiny_run

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
