import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.text import byte_level, rows, save_tokenizer, settings, write_lines
from unmask.config import recipes
from unmask.data import source_files
from unmask.data.infill import encode_prompt
from unmask.data.prepare import prepare, run, sources, workers, writing
from unmask.data.prepare.settings import DATASETS, PrepareSettings
from unmask.data.prepare.sources import FileSource
from unmask.data.store import RowStore
from unmask.data.vocabulary import Vocabulary
from unmask.errors import RunFailed, UserError
from unmask.tasks.sudoku import formats
from unmask.tasks.text_rows import read_problems
from unmask.types import CleanBatch

STORE = ["labels.bin", "meta.json", "prompt_mask.bin", "tokenizer.json", "vocabulary.json"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def all_rows(folder: Path) -> CleanBatch:
    store = RowStore(folder)
    return store[torch.arange(len(store))]


def texts(folder: Path) -> list[tuple[str, str]]:
    """Prompt and answer of each row, the latter up to its end."""
    vocabulary, batch = RowStore(folder).vocabulary, all_rows(folder)
    assert vocabulary is not None
    found = []
    for x0, is_prompt in zip(batch.x0, batch.prompt_mask, strict=True):
        answer = vocabulary.decode(x0[~is_prompt].tolist()).split("<|endoftext|>")[0]
        found.append((vocabulary.decode(x0[is_prompt].tolist()), answer))
    return found


def expected_texts(contents: Sequence[dict[str, Any]], separator: str = "\n") -> list[tuple[str, str]]:
    return [(row["question"].strip() + separator, row["code"].strip()) for row in contents]


def test_a_row_is_prompt_separator_answer_and_ends(tmp_path: Path) -> None:
    meta = prepare(settings(tmp_path))
    store, batch = RowStore(tmp_path / "out"), all_rows(tmp_path / "out")
    vocabulary = store.vocabulary
    assert vocabulary is not None
    assert len(store) == meta["num_examples"] == 50
    for row, x0, is_prompt in zip(rows(50), batch.x0, batch.prompt_mask, strict=True):
        prompt, answer = encode_prompt(vocabulary, row["question"], "\n"), vocabulary.encode(row["code"])
        used = len(prompt) + len(answer)
        assert x0.tolist() == prompt + answer + [vocabulary.eos_id] * (128 - used)
        assert is_prompt.tolist() == [True] * len(prompt) + [False] * (128 - len(prompt))
        assert used < 128


def test_texts_come_back_in_order(tmp_path: Path) -> None:
    prepare(settings(tmp_path))
    assert texts(tmp_path / "out") == expected_texts(rows(50))
    assert sorted(contents(tmp_path / "out")) == STORE
    assert not (tmp_path / "out.partial").exists()


def test_the_reference_reads_it(tmp_path: Path) -> None:
    """Two memory maps of the shapes in meta.json, bits lowest first."""
    prepare(settings(tmp_path))
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    shape = (meta["num_examples"], meta["max_len"])
    labels = np.memmap(tmp_path / "out" / "labels.bin", np.uint32, "r", shape=shape)
    packed = np.memmap(tmp_path / "out" / "prompt_mask.bin", np.uint8, "r", shape=(shape[0], shape[1] // 8))
    batch = all_rows(tmp_path / "out")
    assert (labels == batch.x0.numpy()).all()
    assert (np.unpackbits(packed, axis=-1, bitorder="little").astype(bool) == batch.prompt_mask.numpy()).all()


def test_meta_tells_what_the_store_is(tmp_path: Path) -> None:
    meta = prepare(settings(tmp_path, validation_ratio=0.1, split_seed=7))
    store = RowStore(tmp_path / "out")
    vocabulary = store.vocabulary
    assert vocabulary is not None
    assert store.meta == meta
    assert meta["format"] == "unmask-rows"
    assert (meta["validation_ratio"], meta["split_seed"], meta["separator"]) == (0.1, 7, "\n")
    for key in ("vocab_size", "eos_id", "mask_id"):
        assert meta[key] == getattr(vocabulary, key)
    assert meta["tokenizer"] == {"source": str(tmp_path / "tokenizer"), "fingerprint": vocabulary.fingerprint}
    source = (tmp_path / "rows.jsonl").read_bytes()
    checksum = hashlib.sha256(source).hexdigest()
    assert meta["sources"] == [{"path": str(tmp_path / "rows.jsonl"), "size": len(source), "sha256": checksum}]
    assert {"python", "unmask", "tokenizers", "numpy"} == meta["created_with"].keys()
    assert store.verify()


def test_every_kind_of_file_gives_the_same(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    write_lines(tmp_path / "rows.jsonl.gz", rows(50))
    parquet.write_table(pyarrow.Table.from_pylist(rows(50)), tmp_path / "rows.parquet", row_group_size=13)
    stores = []
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.parquet"):
        prepare(settings(tmp_path, f"out_{name}", sources=(str(tmp_path / name),)))
        stores.append(contents(tmp_path / f"out_{name}"))
    for name in ("labels.bin", "prompt_mask.bin", "tokenizer.json", "vocabulary.json"):
        assert stores[0][name] == stores[1][name] == stores[2][name]


def test_files_are_read_one_after_the_other_and_blank_lines_skipped(tmp_path: Path) -> None:
    a = write_lines(tmp_path / "a.jsonl", ["", *rows(50)[:11], "  ", ""])
    b = write_lines(tmp_path / "b.jsonl.gz", rows(50)[11:])
    meta = prepare(settings(tmp_path, sources=(str(a), str(b))))
    assert meta["rows"]["read"] == 50
    assert texts(tmp_path / "out") == expected_texts(rows(50))


@pytest.mark.parametrize("limit", [1, 8, 13, 1000])
def test_a_limit_takes_the_first_rows(limit: int, tmp_path: Path) -> None:
    prepare(settings(tmp_path, limit=limit))
    assert texts(tmp_path / "out") == expected_texts(rows(50)[:limit])


def test_other_fields_and_separators(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"q": row["question"], "question": 3, "a": row["code"]} for row in rows(9)])
    prepare(settings(tmp_path, prompt_field="q", answer_field="a", separator=" =>\n"))
    assert texts(tmp_path / "out") == expected_texts(rows(9), " =>\n")


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    for count in (1, 3):
        prepare(settings(tmp_path, f"out{count}", workers=count, batch_rows=3))
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")


def lengths(tmp_path: Path) -> dict[int, int]:
    """Tokens of prompt and answer of each of the 50 rows."""
    vocabulary = Vocabulary.from_source(str(tmp_path / "tokenizer"))
    return {
        i: len(encode_prompt(vocabulary, row["question"], "\n")) + len(vocabulary.encode(row["code"]))
        for i, row in enumerate(rows(50))
    }


def test_what_is_too_long_is_dropped(tmp_path: Path) -> None:
    meta = prepare(settings(tmp_path, length=64, too_long="drop"))
    fitting = [row for i, row in enumerate(rows(50)) if lengths(tmp_path)[i] < 64]
    assert texts(tmp_path / "out") == expected_texts(fitting)
    assert 0 < meta["rows"]["kept"] == len(fitting) < 50
    assert meta["rows"]["dropped_too_long"] == 50 - len(fitting)
    assert meta["rows"]["truncated"] == 0


def test_what_is_too_long_is_truncated_and_has_no_end(tmp_path: Path) -> None:
    meta = prepare(settings(tmp_path, length=64))
    long = [i for i, length in lengths(tmp_path).items() if length >= 64]
    batch = all_rows(tmp_path / "out")
    assert meta["rows"]["truncated"] == len(long) > 0
    assert meta["rows"]["kept"] == 50
    ends = (batch.x0 == meta["eos_id"]).any(dim=-1)
    assert (~ends).nonzero().flatten().tolist() == long
    for text, (prompt, answer) in zip(texts(tmp_path / "out"), expected_texts(rows(50)), strict=True):
        assert text[0] == prompt
        assert answer.startswith(text[1])


def test_a_row_fits_if_its_end_does(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    vocabulary = Vocabulary.from_source(str(tmp_path / "tokenizer"))
    assert all(len(vocabulary.encode(text)) == n for n, text in ((3, "日"), (6, "日日")))
    answers = ["日" * 4, "日" * 4 + "\x01", "日" * 4 + "\x01\x02"]
    numbers = [len(encode_prompt(vocabulary, "", "\n")) + len(vocabulary.encode("\x03" + answer)) for answer in answers]
    assert numbers == [14, 15, 16]
    write_lines(tmp_path / "rows.jsonl", [{"question": "\x03", "code": answer} for answer in answers])
    for too_long, kept, truncated in (("drop", 2, 0), ("truncate", 3, 1)):
        meta = prepare(settings(tmp_path, too_long, length=16, too_long=too_long))
        assert (meta["rows"]["kept"], meta["rows"]["truncated"]) == (kept, truncated)


def test_every_row_meets_one_fate_and_is_counted(tmp_path: Path) -> None:
    short = {"question": "?", "code": "1"}
    odd = [
        {"question": "?", "code": " \n"},
        {"question": "", "code": "1"},
        {"question": "日" * 9, "code": "1"},
        {"question": "?", "code": "日" * 9},
        "{",
        {"question": "?"},
    ]
    write_lines(tmp_path / "rows.jsonl", [short, *odd, short])
    for too_long, kept, dropped in (("truncate", 3, 0), ("drop", 2, 1)):
        meta = prepare(settings(tmp_path, too_long, length=16, skip_bad=True, too_long=too_long))
        assert meta["rows"] == {
            "read": 8,
            "kept": kept,
            "truncated": kept - 2,
            "shortened": 0,
            "dropped_too_long": dropped,
            "dropped_no_room": 1,
            "dropped_empty": 2,
            "dropped_short": 0,
            "dropped_unknown": 0,
            "bad": 2,
        }


@pytest.mark.parametrize("mask_token", [None, "<|im_start|>"])
def test_a_used_vocabulary_says_the_same_with_fewer_ids(mask_token: str | None, tmp_path: Path) -> None:
    tokenizer = byte_level(texts=["many other words, " * 9 + "xylophones and zithers " * 9, *rows(9)[0].values()])
    save_tokenizer(tmp_path / "tokenizer", tokenizer)
    metas = {v: prepare(settings(tmp_path, v, vocab=v, length=256, mask_token=mask_token)) for v in ("full", "used")}
    assert texts(tmp_path / "used") == texts(tmp_path / "full") == expected_texts(rows(50))
    assert metas["used"]["vocab_size"] < metas["full"]["vocab_size"]
    full, used = (all_rows(tmp_path / vocab) for vocab in ("full", "used"))
    vocabulary = RowStore(tmp_path / "used").vocabulary
    assert vocabulary is not None
    originals = torch.tensor([-1 if i is None else i for i in vocabulary.original_ids])
    assert torch.equal(originals[used.x0], full.x0)
    assert torch.equal(used.prompt_mask, full.prompt_mask)
    assert int(used.x0.max()) < metas["used"]["vocab_size"]
    assert not (used.x0 == metas["used"]["mask_id"]).any()
    unseen = "xylophones and zithers, 日本"
    assert vocabulary.decode(vocabulary.encode(unseen)) == unseen


class _Killed(BaseException):
    """As a signal would."""


@pytest.mark.parametrize("vocab", ["full", "used"])
@pytest.mark.parametrize("last", [0, 3, 6])
def test_killed_and_called_again_it_makes_the_same_bytes(
    last: int, vocab: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(settings(tmp_path, "whole", vocab=vocab))
    saved: list[str] = []

    def save(path: Path, shard: writing.Shard) -> None:
        if path.stem == f"{last:08d}":
            raise _Killed
        saved.append(path.stem)
        real(path, shard)

    real = writing.save
    monkeypatch.setattr(writing, "save", save)
    with pytest.raises(_Killed):
        prepare(settings(tmp_path, vocab=vocab))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(writing, "save", lambda path, shard: (saved.append(path.stem), real(path, shard)))
    prepare(settings(tmp_path, vocab=vocab))
    assert saved == [f"{number:08d}" for number in range(7)]  # each once
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("place", ["write_store", "_publish"])
def test_killed_at_the_end_it_makes_the_same_bytes(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(settings(tmp_path, "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(run, place, lambda *arguments: (_ for _ in ()).throw(_Killed))
        with pytest.raises(_Killed):
            prepare(settings(tmp_path))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.partial" / "store").mkdir(exist_ok=True)
    (tmp_path / "out.partial" / "store" / "labels.bin").write_bytes(b"half")
    prepare(settings(tmp_path))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def arguments(asked: PrepareSettings) -> list[str]:
    sources = [str(source) for source in asked.sources]
    options = {"tokenizer": asked.tokenizer, "out": asked.out, "length": asked.length, "workers": asked.workers}
    return ["prepare", "tinygsm", *sources, *(f"--{key}={value}" for key, value in options.items())]


HELD_UP = """
import itertools, time
from unmask.cli import run
from unmask.data.prepare import workers

submit, number = workers._submit, itertools.count()

def hold_up(*arguments):
    if next(number) == 3:
        time.sleep(600)
    return submit(*arguments)

workers._submit = hold_up
run()
"""
"""The command `unmask`, which after three batches waits: it cannot be done before the signal comes."""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_ends_all_processes_and_the_work_goes_on(number: int, code: int, tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", rows(100) * 40)
    asked = settings(tmp_path, workers=2, batch_rows=1000)
    process = subprocess.Popen([sys.executable, "-c", HELD_UP, *arguments(asked)], stderr=subprocess.PIPE, text=True)
    partial = tmp_path / "out.partial" / "shards"
    while process.poll() is None and not list(partial.glob("*.npz")):
        time.sleep(0.01)
    process.send_signal(number)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert "Traceback" not in message
    if number == signal.SIGINT:
        assert f"The same command goes on; what is done is in {tmp_path / 'out.partial'}" in message
    assert 0 < len(list(partial.glob("*.npz"))) < 4
    assert not (tmp_path / "out").exists()
    prepare(asked)
    prepare(settings(tmp_path, "whole", batch_rows=1000))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def stop_early(monkeypatch: pytest.MonkeyPatch, asked: PrepareSettings) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_store", lambda *arguments: (_ for _ in ()).throw(_Killed))
        with pytest.raises(_Killed):
            prepare(asked)


CHANGED: dict[str, dict[str, Any]] = {
    "length": {"length": 64},
    "too_long": {"too_long": "drop"},
    "vocab": {"vocab": "used"},
    "separator": {"separator": "\t"},
    "limit": {"limit": 3},
    "fields": {"prompt_field": "code"},
    "mask_token": {"mask_token": "<|im_end|>"},
}


@pytest.mark.parametrize(("key", "changed"), CHANGED.items(), ids=CHANGED.keys())
def test_other_settings_do_not_go_on(
    key: str, changed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_early(monkeypatch, settings(tmp_path))
    with pytest.raises(UserError) as caught:
        prepare(settings(tmp_path, **changed))
    assert f"{tmp_path / 'out.partial'}: holds an unfinished preparation with other settings: " in str(caught.value)
    assert f"{key} (" in str(caught.value)
    assert "delete it, or use another --out" in str(caught.value)
    prepare(settings(tmp_path, workers=2, skip_bad=True))


def test_a_changed_source_or_tokenizer_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_early(monkeypatch, settings(tmp_path))
    write_lines(tmp_path / "rows.jsonl", rows(49))
    with pytest.raises(UserError, match=r"other settings: sources \("):
        prepare(settings(tmp_path))
    write_lines(tmp_path / "rows.jsonl", rows(50))
    save_tokenizer(tmp_path / "tokenizer", byte_level(None))
    with pytest.raises(UserError, match=r"other settings: tokenizer \("):
        prepare(settings(tmp_path))


def test_a_damaged_shard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_early(monkeypatch, settings(tmp_path))
    shard = tmp_path / "out.partial" / "shards" / "00000002.npz"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match=r"00000002\.npz: cannot be read.*delete it, and it is made again"):
        prepare(settings(tmp_path))
    shard.unlink()
    prepare(settings(tmp_path))
    assert texts(tmp_path / "out") == expected_texts(rows(50))


def test_only_one_process_works_in_a_folder(tmp_path: Path) -> None:
    asked = settings(tmp_path)
    with run.WorkFolder(asked.partial, {}), pytest.raises(UserError, match=r"out\.partial: another process works here"):
        prepare(asked)


@pytest.mark.parametrize("is_file", [True, False])
def test_what_exists_is_not_touched(is_file: bool, tmp_path: Path) -> None:
    if is_file:
        (tmp_path / "out").write_text("precious")
    else:
        (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"--out .*out: exists already; delete it, or name another folder"):
        prepare(settings(tmp_path))
    assert not (tmp_path / "out.partial").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match=r"file/out\.partial: cannot be written"):
        prepare(settings(tmp_path, "file/out"))


def test_a_full_disk_is_named_and_the_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, shard: writing.Shard) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "save", full)
        with pytest.raises(RunFailed, match=r"out\.partial: cannot be written: .*No space left.*same command goes on"):
            prepare(settings(tmp_path))
    prepare(settings(tmp_path))


def die(*arguments: object) -> None:
    os._exit(1)


def test_a_dead_worker_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_make", die)
    with pytest.raises(UserError, match=r"--workers 2: a process was killed.*with fewer --workers too"):
        prepare(settings(tmp_path, workers=2))


GOOD = {"question": "How?", "code": "return 1"}
BAD_ROWS: dict[str, tuple[object, str]] = {
    "no JSON": ("{'question'", "not JSON: "),
    "no text": (b"\xff\xfe\x00", "not JSON: "),
    "half a row": ('{"question": "How?", "co', "not JSON: "),
    "a list": ([1, 2], "holds no JSON object: [1, 2]"),
    "a number": ("3", "holds no JSON object: 3"),
    "very deep": ("[" * 100_000, "nested too deeply"),
    "no answer": (
        {"question": "How?", "answer": "1"},
        "has no field 'code', but question, answer (name it: --p",
    ),
    "no prompt": ({"code": "1"}, "has no field 'question', but code"),
    "an empty object": ({}, "has no field 'question', but none"),
    "answer is a number": (GOOD | {"code": 3}, "field 'code' is 3, not text"),
    "answer is null": (GOOD | {"code": None}, "field 'code' is None, not text"),
    "half a character": (GOOD | {"code": "\ud83d"}, "not JSON: \\ud83d is half of a character"),
    "the mask": (
        GOOD | {"code": "a<|im_start|>"},
        "holds the mask token '<|im_start|>' (choose another: --mask-tok",
    ),
    "the end": (GOOD | {"question": "a<|endoftext|>b"}, "holds the end token '<|endoftext|>' (choose another: --eos)"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_the_first_bad_row_is_named(bad: object, message: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [*rows(20), "", bad, *rows(3), "{"])
    with pytest.raises(UserError) as caught:
        prepare(settings(tmp_path, mask_token="<|im_start|>"))
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}, line 22: {message}")
    assert "correct it, or leave out such rows with --skip-bad" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_rows_are_left_out_and_listed(workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = [row for good, (bad, _) in zip(rows(14), BAD_ROWS.values(), strict=True) for row in (good, bad)]
    write_lines(tmp_path / "rows.jsonl", mixed)
    asked = settings(tmp_path, mask_token="<|im_start|>", skip_bad=True, workers=workers)
    meta = prepare(asked)
    assert texts(tmp_path / "out") == expected_texts(rows(14))
    assert meta["rows"]["bad"] == 14
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    for number, row, (_, message) in zip(range(2, 30, 2), listed, BAD_ROWS.values(), strict=True):
        assert row["place"] == f"{tmp_path / 'rows.jsonl'}, line {number}"
        assert row["problem"].startswith(message)
    shown = capsys.readouterr().err
    assert "line 10:" in shown
    assert "line 12:" not in shown
    assert f"further bad rows are listed in {tmp_path / 'out' / 'bad_rows.jsonl'}" in shown


def test_after_a_bad_row_the_work_goes_on_with_skip_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "rows.jsonl", [*rows(20), "{"])
    for _ in range(2):  # it is named again
        with pytest.raises(UserError, match=r"line 21: not JSON"):
            prepare(settings(tmp_path))
    monkeypatch.setattr(writing, "save", lambda path, shard: pytest.fail(f"made {path} again"))
    assert prepare(settings(tmp_path, skip_bad=True))["rows"]["kept"] == 20


def test_no_row_left_is_an_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"question": "?", "code": ""}])
    with pytest.raises(UserError, match=r"out: no row is left: .*1 dropped: an empty prompt"):
        prepare(settings(tmp_path))
    write_lines(tmp_path / "rows.jsonl", [])
    with pytest.raises(UserError, match=r"empty: no row is left"):
        prepare(settings(tmp_path, "empty"))


def test_bad_files_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows(50)))
    files = {
        "cut.jsonl.gz": (whole[:-50], "is cut short: "),
        "plain.jsonl.gz": (b"{}\n", "cannot be read, or is cut short: Not a gzipped file"),
        "damaged.jsonl.gz": (whole[:80] + bytes(40) + whole[120:], "cannot be read, or is cut short: "),
        "rows.csv": (b"", "unknown kind of file; use .jsonl, .jsonl.gz, .parquet"),
        "absent.jsonl": (None, "no such file; name files, or none for the Hugging Face hub"),
    }
    for name, (content, message) in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            prepare(settings(tmp_path, f"out_{name}", sources=(str(tmp_path / name),)))
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
        assert message in str(caught.value)


def test_bad_parquet_files_are_named(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.Table.from_pylist([{"question": "?", "text": "1"}]), tmp_path / "other.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([GOOD, GOOD | {"code": None}]), tmp_path / "null.parquet")
    (tmp_path / "none.parquet").write_bytes(b"PAR1")
    messages = {
        "other": "other.parquet: has no column 'code', but question, text; name the fields with --prompt-field",
        "null": "null.parquet, row 2: field 'code' is None, not text",
        "none": "none.parquet: cannot be read as Parquet",
    }
    for name, message in messages.items():
        with pytest.raises(UserError) as caught:
            prepare(settings(tmp_path, name, sources=(str(tmp_path / f"{name}.parquet"),)))
        assert str(caught.value).startswith(f"{tmp_path}/{message}")


def test_a_parquet_row_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    codes = [GOOD["code"].encode(), b"def f():\n    return '\xff'", GOOD["code"].encode()]
    raw = pyarrow.array(codes, pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())  # is not looked at
    questions = pyarrow.array([f"{i}?" for i in range(3)])
    parquet.write_table(pyarrow.table({"question": questions, "code": text}), tmp_path / "rows.parquet")
    asked = {"sources": (str(tmp_path / "rows.parquet"),)}
    with pytest.raises(UserError, match=r"rows.parquet, row 2: field 'code' is not UTF-8: byte 0xff"):
        prepare(settings(tmp_path, **asked))
    assert prepare(settings(tmp_path, skip_bad=True, **asked))["rows"]["kept"] == 2


def test_half_a_surrogate_pair_is_a_bad_row(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [GOOD, '{"question": "\\ud83d?", "code": "def f(): return 1"}', GOOD])
    with pytest.raises(UserError, match=r"line 2: .*.ud83d is half of a character"):
        prepare(settings(tmp_path))
    assert prepare(settings(tmp_path, skip_bad=True))["rows"]["kept"] == 2
    problems = write_lines(tmp_path / "problems.jsonl", ['{"question": "\\uD83D?", "answer": "1"}'])
    with pytest.raises(UserError, match=r"line 1: .*.ud83d is half of a character"):
        read_problems(problems)


def test_compressed_and_endless_files_are_read_as_far_as_they_are_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_files, "FREE", 2**20)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b" " * 2**23))
    (tmp_path / "bomb.csv.gz").write_bytes(gzip.compress(b"puzzle,solution\n" + b" " * 2**23))
    os.mkfifo(tmp_path / "fifo.csv")
    with pytest.raises(UserError, match=r"bomb.jsonl.gz: gives more than .* bytes, over 100 for each"):
        prepare(settings(tmp_path, sources=(str(tmp_path / "bomb.jsonl.gz"),)))
    with pytest.raises(UserError, match=r"bomb.csv.gz: gives more than"):
        formats.load(tmp_path / "bomb.csv.gz")
    for suffix in ("csv", "txt", "npy", "csv.gz", "npy.gz"):
        (tmp_path / f"device.{suffix}").symlink_to("/dev/zero")
        with pytest.raises(UserError, match="is a device"):
            formats.load(tmp_path / f"device.{suffix}")
    with pytest.raises(UserError, match="is a fifo"):
        formats.load(tmp_path / "fifo.csv")
    monkeypatch.setattr("unmask.data.prepare.sources.MAX_LINE", 100)
    (tmp_path / "line.jsonl").write_bytes(b'{"question": "' + b"x" * 200)
    with pytest.raises(UserError, match=r"line.jsonl, line 1: has more than 100 bytes"):
        prepare(settings(tmp_path, "line", sources=(str(tmp_path / "line.jsonl"),)))


def write_repeated(path: Path, value: str, count: int) -> None:
    """Writes Parquet that holds `value` once, and says that each of `count` rows of each of two groups is it."""
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    places = pyarrow.array([0] * 2 * count, pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(places, pyarrow.array([value]))
    parquet.write_table(pyarrow.table({"text": column, "a.b": column, "other": places}), path, row_group_size=count)


def test_a_small_parquet_file_is_expanded_a_little_at_a_time_and_no_further_than_is_plausible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (source_files, sources):
        monkeypatch.setattr(module, "FREE", 2**20)
    read: list[int] = []
    add = source_files.Plausible.add
    monkeypatch.setattr(source_files.Plausible, "add", lambda self, number: read.append(number) or add(self, number))
    path, value = tmp_path / "bomb.parquet", "x" * 2**17
    write_repeated(path, value, 1000)
    assert path.stat().st_size < 2**15
    for field in ("text", "a.b"):
        rows = FileSource(str(path)).rows((field,))
        assert next(rows).content == {field: value}
        with pytest.raises(UserError, match=r"bomb.parquet: gives more than .* bytes, over 100 for each of its own"):
            list(rows)
        assert max(read) <= 2**20
    monkeypatch.setattr("unmask.machine.memory", lambda: 2**16)
    with pytest.raises(UserError, match=r"bomb.parquet: to read a row group of it needs .* GiB.*smaller row groups"):
        next(FileSource(str(path)).rows(("text",)))
    assert next(FileSource(str(path)).rows(("other",))).content == {"other": 0}


def test_rows_of_parquet_are_the_same_however_few_are_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    given = [{"text": f"text {i}" * (i % 7), "other": i} for i in range(50)]
    parquet.write_table(pyarrow.Table.from_pylist(given), tmp_path / "rows.parquet", row_group_size=13)
    for most in (4096, 5, 1):
        monkeypatch.setattr(sources, "_MOST_ROWS", most)
        found = list(FileSource(str(tmp_path / "rows.parquet")).rows(("text", "other")))
        assert [row.content for row in found] == given
        assert [row.number for row in found] == list(range(1, 51))


def test_an_array_that_claims_more_than_memory_holds(tmp_path: Path) -> None:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<i8", "fortran_order": False, "shape": (10**13, 325)})
    (tmp_path / "x.npy.gz").write_bytes(gzip.compress(head.getvalue()))
    with pytest.raises(UserError, match=r"x.npy.gz: an array of shape .* needs"):
        formats.load(tmp_path / "x.npy.gz")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"rows\.parquet: .*pip install 'unmask\[data\]'"):
        prepare(settings(tmp_path, sources=(str(tmp_path / "rows.parquet"),)))


def hub(monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[dict[str, Any]]]) -> list[tuple[Any, ...]]:
    """A hub of two splits; what it is asked for."""
    asked: list[tuple[Any, ...]] = []

    def stream(dataset: Any, split: str, revision: str) -> list[dict[str, Any]]:
        asked.append((dataset.repository, dataset.config, split, revision))
        return splits[split]

    monkeypatch.setattr("unmask.data.prepare.hub.newest_revision", lambda repository: "abc123")
    monkeypatch.setattr("unmask.data.prepare.hub.stream", stream)
    return asked


def test_gsm8k_from_the_hub_has_its_test_rows_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = ([{"question": row["question"], "answer": row["code"]} for row in rows(n)] for n in (12, 3))
    asked = hub(monkeypatch, {"train": train, "test": test})
    save_tokenizer(tmp_path / "tokenizer")
    meta = prepare(PrepareSettings("gsm8k", str(tmp_path / "tokenizer"), tmp_path / "out", length=128, batch_rows=5))
    assert texts(tmp_path / "out") == expected_texts(rows(12))
    assert [json.loads(line) for line in (tmp_path / "out" / "test.jsonl").read_text().split("\n")[:-1]] == test
    source = {"hub": "openai/gsm8k", "config": "main", "split": "train", "revision": "abc123"}
    assert meta["sources"] == [source]
    assert asked == [("openai/gsm8k", "main", split, "abc123") for split in ("train", "test")]


def test_tinygsm_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, {"train": [*rows(12), {"question": "?", "code": 3}]})
    with pytest.raises(UserError, match=r"TinyGSM/TinyGSM \(train\), row 13: field 'code' is 3"):
        prepare(settings(tmp_path, sources=()))
    prepare(settings(tmp_path, sources=(), skip_bad=True))
    assert texts(tmp_path / "out") == expected_texts(rows(12))
    assert not (tmp_path / "out" / "test.jsonl").exists()


def test_a_hub_out_of_reach_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: object) -> str:
        raise ConnectionError("no network")

    for place in ("stream", "newest_revision"):
        hub(monkeypatch, {"train": []})
        monkeypatch.setattr(f"unmask.data.prepare.hub.{place}", offline)
        with pytest.raises(UserError, match=r"TinyGSM/TinyGSM: not to be had .*: no network; .*download its files"):
            prepare(settings(tmp_path, sources=()))


def test_without_datasets_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.data.prepare.hub.newest_revision", lambda repository: "abc123")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"TinyGSM/TinyGSM: .*pip install 'unmask\[data\]'"):
        prepare(settings(tmp_path, sources=()))


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "length": ({"length": 100}, "--length 100: must be a multiple of 8, eight positions a byte; use 96"),
    "no length": ({"length": 0}, "--length 0: must be a multiple of 8, eight positions a byte; use 8"),
    "too_long": ({"too_long": "cut"}, "--too-long cut: use truncate or drop"),
    "vocab": ({"vocab": "some"}, "--vocab some: use full or used"),
    "limit": ({"limit": 0}, "--limit 0: must be at least 1"),
    "workers": ({"workers": 0}, "--workers 0: must be at least 1"),
    "ratio": ({"validation_ratio": 1.0}, "--validation-ratio 1.0: must be between 0 and 1"),
    "seed": ({"split_seed": -1}, "--split-seed -1: must be from 0 to 2^63 - 1"),
    "dataset": ({"dataset": "gsm9k"}, "gsm9k: use tinygsm or gsm8k"),
}


@pytest.mark.parametrize(("changed", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_bad_settings_are_named(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        PrepareSettings(**({"dataset": "tinygsm", "tokenizer": "x", "out": tmp_path / "out"} | changed))
    assert str(caught.value).startswith(message)


def test_a_store_that_was_changed_is_named(tmp_path: Path) -> None:
    prepare(settings(tmp_path))
    for name in ("labels.bin", "prompt_mask.bin"):
        path = tmp_path / "out" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(UserError, match=rf"{name}: holds .* it is cut short"):
            RowStore(tmp_path / "out")
        path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        with pytest.raises(UserError, match=rf"{name}: was changed or damaged"):
            RowStore(tmp_path / "out").verify()
        path.write_bytes(whole)
    assert RowStore(tmp_path / "out").verify()


def test_real_rows_are_what_the_reference_makes_of_them(qwen: Path, tmp_path: Path) -> None:
    """Question, newline (198) and code by transformers' tokenizer, then the end token (151643)."""
    transformers = pytest.importorskip("transformers")
    source = qwen.parent.parent / "tinygsm_like" / "tinygsm_style_synthetic.jsonl.gz"
    if not source.exists():
        pytest.skip(f"no {source}")
    asked = settings(tmp_path, tokenizer=str(qwen), sources=(str(source),), length=512, limit=200, too_long="drop")
    prepare(asked)
    reference = transformers.AutoTokenizer.from_pretrained(str(qwen))
    with gzip.open(source, "rt", encoding="utf-8") as file:
        examples = [json.loads(line) for line in file][:200]
    expected = []
    for example in examples:
        question, code = (reference(example[key].strip()).input_ids for key in ("question", "code"))
        ids = [*question, 198, *code]
        if len(ids) < 512:
            expected.append((ids + [151643] * (512 - len(ids)), len(question) + 1))
    batch = all_rows(tmp_path / "out")
    assert batch.x0.tolist() == [ids for ids, _ in expected]
    assert batch.prompt_mask.sum(dim=-1).tolist() == [num_prompt for _, num_prompt in expected]


@pytest.mark.parametrize("name", DATASETS)
def test_the_recipe_that_is_recommended_exists(name: str) -> None:
    assert {DATASETS[name].recipe, DATASETS[name].small_recipe} <= set(recipes.names())
