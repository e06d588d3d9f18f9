"""What rows are read from: files, whole and damaged, rows that cannot be used, and the hub."""

import gzip
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.prepared import expected_texts, texts
from tests.helpers.text import rows, save_tokenizer, settings, write_lines
from unmask.data import source_files
from unmask.data.prepare import prepare, sources, writing
from unmask.data.prepare.settings import PrepareSettings
from unmask.data.prepare.sources import FileSource
from unmask.errors import UserError
from unmask.tasks.sudoku import formats
from unmask.tasks.text_rows import read_problems

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
    write_lines(tmp_path / "rows.jsonl", rows(3))
    for out in ("out", "empty"):  # and leaves nothing in the way of other rows
        assert prepare(settings(tmp_path, out))["rows"]["kept"] == 3


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
