"""Rows as `prepare` writes them: prompt, separator, answer and end, and what becomes of those that are too long."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.prepared import all_rows, contents, expected_texts, texts
from tests.helpers.text import byte_level, rows, save_tokenizer, settings, write_lines
from unmask.config import recipes
from unmask.data.infill import encode_prompt
from unmask.data.prepare import prepare
from unmask.data.prepare.settings import DATASETS, PrepareSettings
from unmask.data.store import RowStore
from unmask.data.vocabulary import Vocabulary
from unmask.errors import UserError

STORE = ["labels.bin", "meta.json", "prompt_mask.bin", "tokenizer.json", "vocabulary.json"]


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
