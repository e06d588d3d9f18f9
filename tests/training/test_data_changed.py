"""Data that are no longer those that a run began with are noticed, wherever they are read again."""

import json
import os
import sys
from contextvars import copy_context
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.helpers import run_cli
from tests.helpers.stores import EOS, LENGTH, MASK, VOCAB, rows_with_prompts, write_store
from unmask.config.registry import found_in
from unmask.data import fingerprint
from unmask.data.fingerprint import file_sha256
from unmask.data.store import RowStore
from unmask.data.vocabulary import Vocabulary
from unmask.errors import UserError
from unmask.tasks.gsm8k import Gsm8k, Gsm8kData
from unmask.tasks.sudoku import generator
from unmask.tasks.task import accept_changed_data
from unmask.tasks.text import TextData, find_store
from unmask.training import checkpoint
from unmask.training.exporting import export
from unmask.training.folder import read_environment
from unmask.training.loading import LoadedRun

SETTINGS = [
    *("task.name=tokens", f"data.length={LENGTH}", f"data.vocab_size={VOCAB}", f"data.mask_id={MASK}"),
    *(f"data.eos_id={EOS}", "data.validation_ratio=0.25", "model.dim=8", "model.num_layers=1", "model.num_heads=1"),
    *("train.batch_size=4", "optim.schedule=constant", "eval.examples=2", "eval.every=99", "log.tensorboard=false"),
    *("decode.order=prob", "decode.tokens_per_step=16", "eval.tokens_per_step=[16]"),
]


def write_rows(folder: Path, number: int, first: int = 0) -> Path:
    labels, prompts = rows_with_prompts()
    return write_store(folder, labels[first : first + number], prompts[first : first + number])


def train(folder: Path, steps: int, *more: str) -> int:
    settings = [*SETTINGS, f"data.path={folder / 'store'}", f"train.steps={steps}"]
    return run_cli("train", "debug", *settings, "--out", folder / "run", *more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `store` of 32 rows, and a `run` of one step on it."""
    folder = tmp_path_factory.mktemp("data_changed")
    write_rows(folder / "store", 32)
    assert train(folder, 1) == 0
    return folder


def errors(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_environment_and_checkpoint_keep_what_the_data_were(trained: Path) -> None:
    kept = read_environment(trained / "run")["data"]
    assert checkpoint.load(trained / "run" / "checkpoints" / "step_00000001")["data"] == kept
    assert (kept["rows"], kept["bytes"], kept["held_out"]) == (32, 32 * LENGTH * 4 + 32 * LENGTH // 8, 8)
    assert LoadedRun.open(trained / "run").data == fingerprint.read_fingerprint(kept, "")


@pytest.mark.parametrize(("number", "first", "what"), [(64, 0, "64 rows, where it had 32"), (32, 1, "other contents")])
def test_other_data_are_refused_until_they_are_accepted(
    trained: Path, tmp_path: Path, number: int, first: int, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """More rows, and as many of other contents."""
    before = {path: path.read_bytes() for path in (trained / "run").rglob("*") if path.is_file()}
    write_rows(trained / "store", number, first)
    page = tmp_path / "report.html"
    try:
        for command in (
            lambda *more: train(trained, 2, "--resume", *more),
            lambda *more: run_cli("eval", trained / "run", *more),
            lambda *more: run_cli("diagnose", trained / "run", "--only", "nll", "--draws", 1, "--examples", 2, *more),
        ):
            assert command() == 2
            found = errors(capsys)
            assert f"data.path={trained / 'store'}: not what" in found
            assert what in found
            assert "--data-changed" in found
            assert {path: path.read_bytes() for path in before} == before
        assert run_cli("eval", trained / "run", "--data-changed") == 0
        assert run_cli("eval", trained / "run", "--data", trained / "store") == 0  # named by the user
        capsys.readouterr()
        assert run_cli("report", trained / "run", "--out", page) in (0, 2)  # without an evaluation there is no page
    finally:
        write_rows(trained / "store", 32)
        capsys.readouterr()


def test_accepted_data_are_those_of_the_run_from_then_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "store", 32)
    assert train(tmp_path, 1) == 0
    write_rows(tmp_path / "store", 48)
    assert train(tmp_path, 2, "--resume") == 2
    assert train(tmp_path, 2, "--resume", "--data-changed") == 0
    assert LoadedRun.open(tmp_path / "run").data.rows == 48
    assert train(tmp_path, 3, "--resume") == 0
    capsys.readouterr()
    assert train(tmp_path, 3, "--data-changed") == 2
    assert "--data-changed: goes with --resume" in errors(capsys)


def strip_fingerprint(run: Path) -> None:
    """Makes `run` one from before fingerprints were kept."""
    environment = read_environment(run)
    del environment["data"]
    (run / "environment.json").write_text(json.dumps(environment))
    (found,) = (run / "checkpoints").iterdir()
    state = checkpoint.load(found)
    del state["data"]
    checkpoint.save(found.parent, 1, state)
    assert LoadedRun.open(run).data is None


def test_a_run_from_before_goes_on(tmp_path: Path) -> None:
    write_rows(tmp_path / "store", 32)
    assert train(tmp_path, 1) == 0
    strip_fingerprint(tmp_path / "run")
    assert run_cli("eval", tmp_path / "run", "--data-changed") == 0
    assert run_cli("eval", tmp_path / "run", "--data", tmp_path / "store") == 0
    assert train(tmp_path, 2, "--resume") == 0
    assert LoadedRun.open(tmp_path / "run").data is not None
    assert run_cli("eval", tmp_path / "run") == 0


opened: list[str] = []
"""Files that this process has opened since the last `clear`, once `sees_opened` was used."""


@pytest.fixture(scope="module")
def sees_opened() -> None:
    sys.addaudithook(lambda event, values: opened.append(str(values[0])) if event == "open" else None)


@pytest.mark.usefixtures("sees_opened")
def test_no_verb_opens_unasked_what_a_run_names_without_a_fingerprint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run may be a stranger's, and the path lead to a private file."""
    write_rows(tmp_path / "store", 32)
    assert train(tmp_path, 1, "eval.every=1") == 0
    run = tmp_path / "run"
    strip_fingerprint(run)
    export(run, tmp_path / "export")
    description = json.loads((tmp_path / "export" / "config.json").read_text())
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key in ("length", "eos_id", "fingerprint"):  # a store fills in what is missing, where it is the user's
        del config["data"][key]
        del description["run"]["data"][key]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "export" / "config.json").write_text(json.dumps(description))
    (tmp_path / "prompt.txt").write_text("[1, 2]\n")
    page, diagnose = tmp_path / "page.html", ("diagnose", run, "--only", "nll", "--draws", 1, "--examples", 2)
    commands = [
        *(("eval", run), ("eval", tmp_path / "export"), ("eval", run, "--task", "tokens"), diagnose),
        *(
            ("report", run, "--out", page),
            ("decode", run, tmp_path / "prompt.txt"),
            ("export", run, tmp_path / "other"),
        ),
    ]
    for command in commands:
        opened.clear()
        capsys.readouterr()
        status, said = run_cli(*command), errors(capsys)
        assert not [path for path in opened if path.startswith(str(tmp_path / "store"))], command
        if command[0] in ("eval", "diagnose"):
            assert (status, said.count("so they are not opened")) == (2, 1)
            assert "--data-changed" in said
    assert str(tmp_path / "store" / "meta.json") not in opened
    assert "so they are not opened" in page.read_text()


def test_a_vocabulary_that_only_the_run_names_needs_its_fingerprint(tmp_path: Path) -> None:
    ours = Vocabulary.of_bytes()
    (tmp_path / "elsewhere").mkdir()
    ours.save(tmp_path / "elsewhere")
    ids = {"vocab_size": ours.vocab_size, "mask_id": ours.mask_id, "eos_id": ours.eos_id}
    with found_in(tmp_path):
        read = [
            Gsm8kData(tokenizer=str(tmp_path / "elsewhere"), fingerprint=fingerprint, **ids).of_run(tmp_path / "run")
            for fingerprint in (None, ours.fingerprint, "another")
        ]
    with pytest.raises(UserError, match=r"neither its vocabulary nor a fingerprint of it.*--data-changed"):
        _ = Gsm8k(read[0]).vocabulary
    assert copy_context().run(lambda: (accept_changed_data(), Gsm8k(read[0]).vocabulary.vocab_size)[1]) == 258
    assert Gsm8k(read[1]).vocabulary.fingerprint == ours.fingerprint
    with pytest.raises(UserError, match="is not the data's tokenizer"):
        _ = Gsm8k(read[2]).vocabulary


def test_an_export_keeps_it(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(trained / "run", tmp_path / "export")
    write_rows(trained / "store", 30)
    try:
        assert run_cli("eval", tmp_path / "export") == 2
        assert "30 rows, where it had 32" in errors(capsys)
    finally:
        write_rows(trained / "store", 32)


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_page_shows_nothing_of_a_file_that_only_the_run_names(tmp_path: Path, is_kept: bool) -> None:
    """A stranger's run may name a private file: neither its rows nor an error about them belong on a page."""
    write_rows(tmp_path / "store", 32)
    assert train(tmp_path, 1) == 0
    run = LoadedRun.open(tmp_path / "run", is_published=True)
    assert len(run.held_out(2)) == 2
    write_rows(tmp_path / "store", 30)
    (tmp_path / "store" / "meta.json").write_text('{"secret": 1}')
    run = LoadedRun.open(tmp_path / "run", is_published=True)
    run.data = run.data if is_kept else None
    with pytest.raises(UserError, match="--data-changed") as caught:
        run.held_out(2)
    assert "num_examples" not in str(caught.value)


def test_a_cache_that_the_run_names_is_not_used(tmp_path: Path) -> None:
    assert run_cli(
        *("train", "debug", "data.puzzles=16", "data.validation_ratio=0.25", f"data.cache_dir={tmp_path / 'theirs'}"),
        *("model.dim=8", "model.num_layers=1", "model.num_heads=1", "train.steps=1", "train.batch_size=4"),
        *("eval.examples=2", "log.tensorboard=false", "--out", tmp_path / "run"),
    ) == 0  # fmt: skip
    (tmp_path / "theirs").rename(tmp_path / "elsewhere")
    assert run_cli("eval", tmp_path / "run") == 0
    assert not (tmp_path / "theirs").exists()


def test_the_hub_is_not_asked_for_what_a_run_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    typed = Gsm8kData(path=str(tmp_path), tokenizer="owner/name")
    task = Gsm8k(typed.of_run(tmp_path))
    with pytest.raises(UserError, match=r"data.tokenizer=owner/name: .*hub is not asked for what a run names"):
        _ = task.vocabulary


def test_a_store_whose_bytes_were_changed_is_refused(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "store", 32)
    store = RowStore(folder)
    meta = {"num_examples": 32, "max_len": LENGTH, "sha256": store.checksums}
    (folder / "meta.json").write_text(json.dumps(meta))
    assert RowStore(folder).verify()
    labels = bytearray((folder / "labels.bin").read_bytes())
    labels[0] ^= 1
    (folder / "labels.bin").write_bytes(labels)
    assert run_cli("eval", tmp_path) == 2
    with pytest.raises(UserError, match=r"labels.bin: was changed or damaged"):
        RowStore(folder).verify()
    settings = [*SETTINGS, f"data.path={folder}", "train.steps=1"]
    assert run_cli("train", "debug", *settings, "--out", tmp_path / "run") == 2


def change_a_byte(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_kept_store_of_text_that_was_changed_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abcdefgh":
        (tmp_path / f"{name}.txt").write_text(f"A document named {name}, of some length at least.\n" * 5)
    (tmp_path / "texts").mkdir()
    for path in tmp_path.glob("*.txt"):
        path.rename(tmp_path / "texts" / path.name)
    config = TextData(path=str(tmp_path / "texts"), length=16, validation_ratio=0.3, cache_dir=str(tmp_path / "cache"))
    folder = find_store(config)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("labels.bin", "prompt_mask.bin", "meta.json", "vocabulary.json"):
        capsys.readouterr()
        change_a_byte(folder / name, place=len(whole[name]) // 2)
        assert find_store(config) == folder
        assert "is made again now" in errors(capsys)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert find_store(config) == folder
    assert not errors(capsys)


def test_kept_puzzles_that_were_changed_are_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def load() -> bytes:
        return generator.load_or_generate(20, (40, 45), "singles", 7, tmp_path).solutions.tobytes()

    first = load()
    (table,) = tmp_path.rglob("*.npy")
    boards = np.load(table)
    swapped = np.array([0, 2, 1, *range(3, 10)], np.uint8)[boards]  # as right as before, and others
    for other in (swapped, boards[:, :100], boards[:5], boards.astype(np.float64), boards.reshape(-1)):
        np.save(table, other)
        capsys.readouterr()
        assert load() == first
        assert "is made again now" in errors(capsys)
    table.write_bytes(b"")
    assert load() == first
    table.with_name(f"{table.name}.sha256").unlink()  # as an older version left it
    capsys.readouterr()
    assert load() == first
    assert not errors(capsys)
    assert table.with_name(f"{table.name}.sha256").exists()


def test_a_large_file_is_read_again_only_if_it_may_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "SMALL", 4)
    monkeypatch.setattr(fingerprint, "_SETTLED", -60.0)
    read: list[Path] = []
    compute = fingerprint._compute
    monkeypatch.setattr(fingerprint, "_compute", lambda path: read.append(path) or compute(path))
    file = tmp_path / "file"
    file.write_bytes(b"12345678")
    first = file_sha256(file)
    assert file_sha256(file) == first
    assert len(read) == 1
    status = file.stat()
    file.write_bytes(b"12345679")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_sha256(file) != first
    assert len(read) == 2
