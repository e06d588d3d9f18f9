import json
from pathlib import Path

import pytest

from tests.helpers import run_cli
from tests.helpers.text import rows, save_tokenizer, write_lines
from unmask.data.store import RowStore


@pytest.fixture
def files(tmp_path: Path) -> list[object]:
    """Arguments that prepare 50 rows."""
    source = write_lines(tmp_path / "rows.jsonl.gz", rows(50))
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    return ["tinygsm", source, "--tokenizer", tokenizer, "--length", 128, "--workers", 1]


def test_json_is_the_meta(files: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("prepare", *files, "--out", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out) == RowStore(tmp_path / "out").meta


def test_people_see_counts_and_what_to_do_next(
    files: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("prepare", *files, "--out", tmp_path / "out", "--vocab", "used", "--validation-ratio", 0.1) == 0
    printed = capsys.readouterr().out
    assert "50  rows read" in printed
    assert "50  rows kept" in printed
    assert "dropped" not in printed
    meta = RowStore(tmp_path / "out").meta
    assert meta["validation_ratio"] == 0.1
    assert f"{meta['vocab_size']}  ids; the mask is {meta['mask_id']}, the end {meta['eos_id']}" in printed


def test_the_command_that_it_names_trains(
    files: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("prepare", *files, "--out", tmp_path / "out", "--vocab", "used") == 0
    unmask, *command = capsys.readouterr().out.strip().splitlines()[-1].removeprefix("Next: ").split()
    assert unmask == "unmask"
    tiny = ["model.preset=tiny", "train.steps=2", "train.batch_size=4", "train.device=cpu", "train.compile=false"]
    small = ["eval.every=2", "eval.examples=1", "eval.tokens_per_step=[64]", "log.tensorboard=false"]
    assert run_cli(*command, *tiny, *small, "--out", tmp_path / "run") == 0


def test_the_separator_of_a_shell(files: list[object], tmp_path: Path) -> None:
    assert run_cli("prepare", *files, "--out", tmp_path / "out", "--separator", r"\n\t") == 0
    assert RowStore(tmp_path / "out").meta["separator"] == "\n\t"


BAD = {
    "data set": (["gsm9k"], {}, "gsm9k: use tinygsm or gsm8k"),
    "length": ([], {"--length": 100}, "--length 100: must be a multiple of 8"),
    "too long": ([], {"--too-long": "cut"}, "--too-long cut: use truncate or drop"),
    "end": ([], {"--eos": "</s>"}, "--eos </s>:"),
    "mask": ([], {"--mask-token": "[MASK]"}, "--mask-token [MASK]:"),
    "field": ([], {"--answer-field": "answer"}, "line 1: has no field 'answer', but question, code"),
}


@pytest.mark.parametrize(("dataset", "options", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(
    dataset: list[str],
    options: dict[str, object],
    message: str,
    files: list[object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files[: len(dataset)] = dataset
    changed = [part for option in options.items() for part in option]
    assert run_cli("prepare", *files, *changed, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_what_exists_is_not_touched(files: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    assert run_cli("prepare", *files, "--out", tmp_path / "out") == 2
    assert "exists already" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupt_says_how_it_goes_on(
    files: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("unmask.data.prepare.run.write_store", interrupt)
        assert run_cli("prepare", *files, "--out", tmp_path / "out") == 130
    assert "The same command goes on" in capsys.readouterr().err
    assert run_cli("prepare", *files, "--out", tmp_path / "out") == 0


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_a_folder_that_is_always_there_is_refused(
    files: list[object], out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert run_cli("prepare", *files, "--out", out) == 2
    assert "exists already; delete it, or name another folder" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
