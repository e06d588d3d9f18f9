"""`unmask chat`, its lines piped in."""

import io
from pathlib import Path

import pytest

from tests.helpers import run_cli
from tests.helpers.runs import decode_prompts
from tests.helpers.sudoku import EASY


def chat(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *said: str, arguments: tuple = ()
) -> tuple[list[str], str]:
    """The answers to what is said, and what stood on stderr."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in said)))
    assert run_cli("chat", run, *arguments) == 0
    printed = capsys.readouterr()
    return [line for line in printed.out.splitlines() if line.startswith("answer: ")], printed.err


def test_it_answers_as_decode_does(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [EASY, "", "/decoder margin,tokens_per_step=9", EASY, "/decoder prob,temperature=1", "/seed 5", EASY]
    answers, _ = chat(run, monkeypatch, capsys, *said)
    decoders = ["prob", "margin,tokens_per_step=9", "prob,tokens_per_step=9,temperature=1,seed=5"]
    expected = [decode_prompts(run, tmp_path, [EASY], "--decoder", decoder)[0]["answer"] for decoder in decoders]
    assert answers == [f"answer: {answer}" for answer in expected]
    assert len(set(answers)) == 3


WRONG = {
    "foo": "a puzzle has 81 cells, this has 3",
    '{"puzzle": 3}': "needs the string `puzzle`",
    "/seed x": "/seed 'x': give a whole number",
    "/decoder certain": "/decoder certain: decode.order='certain': unknown order",
    "/decoder prob,guidance=1": "needs a model that has also seen hidden prompts",
    "/decoder prob,block_size=100": "decode.block_size=100",
    "/nope": "/nope: no such command; use /decoder, /seed, /new, /help or /quit",
}


def test_what_is_wrong_is_said_and_changes_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, printed = chat(run, monkeypatch, capsys, EASY, *(line for wrong in WRONG for line in (wrong, EASY)))
    for message in WRONG.values():
        assert message in printed
    assert printed.count("Error: ") == len(WRONG)
    assert len(answers) == 1 + len(WRONG)
    assert len(set(answers)) == 1


def test_commands(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    decoder = ("--decoder", "margin,tokens_per_step=20")
    answers, printed = chat(run, monkeypatch, capsys, "/help", "/decoder", "/quit", EASY, arguments=decoder)
    assert answers == []
    assert "/decoder margin,threshold=0.9" in printed
    assert "decoder margin/20" in printed


def test_passes_and_seconds_are_told(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(EASY))
    assert run_cli("chat", run, "--decoder", "prob,tokens_per_step=51") == 0
    printed = capsys.readouterr().out
    assert f"puzzle: {EASY}" in printed
    assert "solved: false" in printed
    assert "\n1 forward pass, " in printed
