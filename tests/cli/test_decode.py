"""`unmask decode`: what is written, when, and what it depends on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import SHORT, lines, run_cli
from tests.helpers.runs import decode_prompts
from tests.helpers.sudoku import EASY
from unmask.cli.session import Answer, DecodeSession
from unmask.files import FileLock

SAMPLED = ["--decoder", "random,temperature=1,tokens_per_step=9"]


@pytest.fixture(scope="module")
def exact_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In double precision, where the order of sums cannot turn a choice."""
    out = tmp_path_factory.mktemp("runs") / "exact"
    assert run_cli("train", "debug", *SHORT, "train.dtype=float64", "--out", out) == 0
    return out


def puzzles(number: int) -> list[str]:
    """Each has one given less than the one before, so that rows end at different steps."""
    givens = [cell for cell, symbol in enumerate(EASY) if symbol != "0"]
    return ["".join("0" if cell in givens[:i] else symbol for cell, symbol in enumerate(EASY)) for i in range(number)]


@pytest.mark.parametrize("decoder", ["margin,tokens_per_step=5", "prob,temperature=0.7,tokens_per_step=3"])
def test_a_prompt_is_answered_the_same_in_any_company(exact_run: Path, tmp_path: Path, decoder: str) -> None:
    prompts = [{"puzzle": puzzle, "seed": 10 * i} for i, puzzle in enumerate(puzzles(4))]
    together = decode_prompts(exact_run, tmp_path, prompts, "--decoder", decoder)
    assert len({record["answer"] for record in together}) > 1
    alone = [decode_prompts(exact_run, tmp_path, [prompt], "--decoder", decoder)[0] for prompt in prompts]
    assert together == alone
    assert decode_prompts(exact_run, tmp_path, prompts, "--decoder", f"{decoder},batch_size=3") == together


def test_samples_of_a_prompt(exact_run: Path, tmp_path: Path) -> None:
    prompts = puzzles(2)
    once = decode_prompts(exact_run, tmp_path, prompts, *SAMPLED)
    thrice = decode_prompts(exact_run, tmp_path, prompts, *SAMPLED[:-1], f"{SAMPLED[-1]},batch_size=4", "--n", 3)
    assert [record.pop("sample") for record in thrice] == [0, 1, 2] * 2
    assert [record["puzzle"] for record in thrice] == [prompts[0]] * 3 + [prompts[1]] * 3
    assert thrice[::3] == once
    assert len({record["answer"] for record in thrice}) == 6


def test_a_prompts_number_is_its_seed(exact_run: Path, tmp_path: Path) -> None:
    first, second = decode_prompts(exact_run, tmp_path, [EASY, EASY], *SAMPLED)
    assert first["answer"] != second["answer"]
    moved = decode_prompts(exact_run, tmp_path, [{"puzzle": EASY, "seed": 1}, {"puzzle": EASY, "seed": 0}], *SAMPLED)
    assert moved == [second, first]


def test_samples_that_would_be_the_same_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.txt").write_text(EASY)
    assert run_cli("decode", run, tmp_path / "x.txt", "--n", 2) == 2
    assert "--n 2: with decode.temperature=0 all answers to a prompt are the same" in capsys.readouterr().err
    never_again = "steps=5,remask=remdm_cap,remask_eta=0"
    assert run_cli("decode", run, tmp_path / "x.txt", "--n", 2, "--decoder", never_again) == 2
    assert "all answers to a prompt are the same" in capsys.readouterr().err


@pytest.mark.parametrize(
    "decoder", ["prob,tokens_per_step=7", "prob,temperature=1,steps=9,remask=p2", "prob,steps=9,remask=rcr"]
)
def test_a_trace_leads_from_the_prompt_to_the_answer(exact_run: Path, tmp_path: Path, decoder: str) -> None:
    plain = decode_prompts(exact_run, tmp_path, puzzles(3), "--decoder", decoder)
    traced = decode_prompts(exact_run, tmp_path, puzzles(3), "--decoder", decoder, "--trace")
    for record, without in zip(traced, plain, strict=True):
        steps = record.pop("trace")
        assert record == without
        assert len(steps) == record["nfe"]
        canvas = [int(symbol) or 10 for symbol in record["puzzle"]]
        for step in steps:
            for position, value in zip(step["revealed"], step["values"], strict=True):
                assert canvas[position] == 10
                canvas[position] = value
            for position in step["again"]:
                canvas[position] = 10
        assert canvas == record["tokens"]


def test_what_is_forbidden_is_never_written(run: Path, tmp_path: Path) -> None:
    (free,) = decode_prompts(run, tmp_path, [EASY])
    written = {token for token, given in zip(free["tokens"], EASY, strict=True) if given == "0"}
    forbidden = max(written)
    (record,) = decode_prompts(run, tmp_path, [EASY], "--forbid", forbidden)
    assert forbidden not in {token for token, given in zip(record["tokens"], EASY, strict=True) if given == "0"}


def test_what_is_no_token_cannot_be_forbidden(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.txt").write_text(EASY)
    for text in ("x", "10"):  # 10 is the mask
        assert run_cli("decode", run, tmp_path / "x.txt", "--forbid", text) == 2
        assert f"--forbid '{text}': is no token of this task; its tokens are 1, 2," in capsys.readouterr().err


BAD_OBJECTS = {
    "no puzzle": ('{"puzle": ""}', "needs the string `puzzle`"),
    "empty": ('{"puzzle": " "}', "needs the string `puzzle`"),
    "no JSON": ("{", "not JSON"),
    "seed below 0": (f'{{"puzzle": "{EASY}", "seed": -1}}', "seed=-1: must be a whole number from 0"),
    "seed of text": (f'{{"puzzle": "{EASY}", "seed": "a"}}', 'seed="a": must be a whole number from 0'),
    "seed true": (f'{{"puzzle": "{EASY}", "seed": true}}', "seed=true: must be a whole number from 0"),
    "large seed": (f'{{"puzzle": "{EASY}", "seed": 4294967296}}', "seed=4294967296: must be"),
}


@pytest.mark.parametrize(("line", "message"), BAD_OBJECTS.values(), ids=BAD_OBJECTS)
def test_a_bad_object_is_named(
    run: Path, tmp_path: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.txt").write_text(f"{EASY}\n\n{line}\n")
    assert run_cli("decode", run, tmp_path / "x.txt") == 2
    assert f"{tmp_path / 'x.txt'}, line 3: {message}" in capsys.readouterr().err


def interrupting(after: int, seen: Callable[[], None]) -> Callable[..., list[Answer]]:
    """Returns a `DecodeSession.decode` that is stopped by Ctrl-C in the batch after so many."""
    decode, calls = DecodeSession.decode, []

    def stopping(*arguments: Any) -> list[Answer]:
        calls.append(1)
        if len(calls) > after:
            seen()
            raise KeyboardInterrupt
        return decode(*arguments)

    return stopping


@pytest.mark.parametrize("num_done", [0, 2])
def test_ctrl_c_keeps_what_is_done(
    run: Path, tmp_path: Path, num_done: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, part, on_disk = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part", []
    monkeypatch.setattr(DecodeSession, "decode", interrupting(num_done, lambda: on_disk.extend(lines(part))))
    (tmp_path / "x.txt").write_text("\n".join(puzzles(3)))
    arguments = ["--decoder", "prob,batch_size=1,tokens_per_step=20", "--out", out]
    assert run_cli("decode", run, tmp_path / "x.txt", *arguments) == 130
    said = f"Interrupted: {num_done} of 3 answers are written to {part}"
    assert f"{said}{'; the same command goes on from there' * bool(num_done)}\n" in capsys.readouterr().err
    assert len(on_disk) == num_done  # written as soon as they were there
    assert lines(part) == on_disk if num_done else {path.name for path in tmp_path.iterdir()} == {"x.txt"}
    assert not out.exists()


def test_the_same_command_goes_on_with_what_was_stopped(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answers are those of a call that nobody stopped, bit for bit, also after a kill in the middle of a line."""
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    prompts, other = tmp_path / "x.txt", tmp_path / "y.txt"
    prompts.write_text("\n".join(puzzles(3)))
    other.write_text("\n".join(puzzles(4)[1:]))
    decoder = "random,temperature=1,batch_size=2,tokens_per_step=30"

    def decode(file: Path = prompts, to: Path = out, decoder: str = decoder, num: int = 2, *more: str) -> int:
        return run_cli("decode", run, file, "--decoder", decoder, "--n", num, "--out", to, *more)

    assert decode(to=tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(DecodeSession, "decode", interrupting(2, lambda: None))
        assert decode() == 130
    part.write_text(part.read_text() + '{"puzzle": "0')
    before = part.read_bytes()
    capsys.readouterr()
    for changed, word in (
        ({"file": other}, "prompts was"),
        ({"decoder": f"{decoder},seed=1"}, "decoder.seed was 0 and is 1"),
        ({"decoder": decoder.replace("size=2", "size=3")}, "decoder.batch_size was 2 and is 3"),
        ({"num": 3}, "n was 2 and is 3"),
    ):
        assert decode(**changed) == 2
        said = capsys.readouterr().err
        assert f"{part}: is unfinished work on something else: {word}" in said
        assert "To go on, give the same again; else move it away, or name another file" in said
    assert run_cli("decode", run, prompts, "--decoder", decoder, "--n", 2, "--out", out, "--step", 2) == 2
    assert "checkpoint was" in capsys.readouterr().err
    with FileLock(part, wait=False):
        assert decode() == 2
    assert f"another process is writing {part}" in capsys.readouterr().err
    assert part.read_bytes() == before
    assert decode() == 0
    assert f"Going on with {part}: 4 of 6 answers are there" in capsys.readouterr().err
    found, expected = lines(out), lines(tmp_path / "whole")
    assert [record | {"seconds": 0} for record in found] == [record | {"seconds": 0} for record in expected]
    assert {path.name for path in tmp_path.iterdir()} == {"x.txt", "y.txt", "whole", "out.jsonl"}
    part.write_text("{}\n")
    assert decode(to=tmp_path / "out.jsonl") == 2  # it exists
    out.unlink()
    assert decode() == 2
    assert "out.jsonl.part.json, which says of what, is gone" in capsys.readouterr().err


def test_guidance_needs_a_run_that_hid_prompts(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.txt").write_text(EASY)
    for arguments in (["decode", run, tmp_path / "x.txt"], ["eval", run], ["chat", run]):
        assert run_cli(*arguments, "--decoder", "prob,guidance=2") == 2
        assert "decode.guidance=2.0 needs a model that has also seen hidden prompts" in capsys.readouterr().err


def test_a_list_may_stand_in_a_decoder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoder = "prob,forbid=[0,3],tokens_per_step=9"
    assert run_cli("eval", run, "--examples", 1, "--decoder", decoder, "--json") == 0
    assert list(json.loads(capsys.readouterr().out)["accuracy"]) == ["prob/9/forbid0+3"]


def test_tokens_are_the_whole_canvas(run: Path, tmp_path: Path) -> None:
    (record,) = decode_prompts(run, tmp_path, [EASY])
    assert "".join(map(str, record["tokens"])) == record["answer"]
    assert torch.tensor(record["tokens"]).shape == (81,)
