from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.stores import random_rows, write_store
from unmask.data.store import RowStore
from unmask.errors import UserError


@pytest.mark.parametrize(("num_rows", "length"), [(1, 8), (7, 16), (50, 24), (20, 512)])
def test_rows_are_read_exactly_in_any_order_and_repeatedly(tmp_path: Path, num_rows: int, length: int) -> None:
    labels, prompt_mask = random_rows(num_rows, length)
    store = RowStore(write_store(tmp_path, labels, prompt_mask))
    assert (len(store), store.length) == (num_rows, length)
    rng = np.random.default_rng(1)
    for index in (
        np.arange(num_rows),
        rng.permutation(num_rows),
        rng.integers(0, num_rows, 3 * num_rows),
        np.arange(0),
    ):
        for _ in range(2):
            batch = store[torch.from_numpy(index)]
            assert batch.x0.dtype == torch.int64
            assert batch.prompt_mask.dtype == torch.bool
            assert (batch.x0.numpy() == labels[index]).all()
            assert (batch.prompt_mask.numpy() == prompt_mask[index]).all()


def test_the_lowest_bit_is_the_first_position(tmp_path: Path) -> None:
    write_store(tmp_path, np.zeros((1, 16)), np.zeros((1, 16), bool))
    (tmp_path / "prompt_mask.bin").write_bytes(bytes([0b00000111, 0b10000000]))
    assert RowStore(tmp_path)[torch.tensor([0])].prompt_mask[0].nonzero().flatten().tolist() == [0, 1, 2, 15]


def test_what_is_read_can_be_changed_and_the_files_stay(tmp_path: Path) -> None:
    labels, prompt_mask = random_rows(4, 8)
    store = RowStore(write_store(tmp_path, labels, prompt_mask))
    before = (tmp_path / "labels.bin").read_bytes()
    store[torch.arange(4)].x0.zero_()
    assert (store[torch.arange(4)].x0.numpy() == labels).all()
    assert (tmp_path / "labels.bin").read_bytes() == before


def test_other_keys_of_the_meta_do_not_matter(tmp_path: Path) -> None:
    folder = write_store(tmp_path, *random_rows(4, 8), tokenizer="Qwen/Qwen2-0.5B", mask="<|mask|>")
    assert len(RowStore(folder)) == 4


BAD_META = {
    "no rows": ({"num_examples": 0}, "num_examples=0: must be a positive whole number"),
    "half a row": ({"num_examples": 1.5}, "num_examples=1.5: must be a positive whole number"),
    "text": ({"num_examples": "4"}, "num_examples='4': must be a positive whole number"),
    "true": ({"num_examples": True}, "num_examples=True: must be a positive whole number"),
    "null": ({"max_len": None}, "max_len=None: must be a positive whole number"),
    "negative": ({"max_len": -8}, "max_len=-8: must be a positive whole number"),
    "other ids": ({"labels_dtype": "uint16"}, "labels_dtype='uint16': must be 'uint32'"),
    "unpacked": ({"prompt_mask_packed": False}, "prompt_mask_packed=False: must be True"),
    "bits": ({"prompt_mask_bitorder": "middle"}, "prompt_mask_bitorder='middle': must be 'little' or 'big'"),
    "half a byte": ({"max_len": 12}, "max_len=12: must be a multiple of 8"),
}


@pytest.mark.parametrize(("meta", "message"), BAD_META.values(), ids=BAD_META.keys())
def test_bad_meta_names_file_key_and_value(tmp_path: Path, meta: dict[str, Any], message: str) -> None:
    write_store(tmp_path, *random_rows(4, 8), **meta)
    with pytest.raises(UserError) as caught:
        RowStore(tmp_path)
    assert f"{tmp_path / 'meta.json'}: {message}" in str(caught.value)


BAD_JSON = {
    "no JSON": (b"{", "is not JSON"),
    "no text": (b"\xff\xfe\xfa", "byte 0xff is not UTF-8"),
    "empty": (b"", "is not JSON"),
    "a list": (b"[4, 8]", "holds no JSON object; it needs num_examples and max_len"),
    "no keys": (b"{}", "num_examples=None: must be a positive whole number"),
}


@pytest.mark.parametrize(("content", "message"), BAD_JSON.values(), ids=BAD_JSON.keys())
def test_unreadable_meta_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    write_store(tmp_path, *random_rows(4, 8))
    (tmp_path / "meta.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        RowStore(tmp_path)
    assert str(tmp_path / "meta.json") in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize(("name", "size"), [("labels.bin", 4 * 8 * 4), ("prompt_mask.bin", 4)])
def test_a_file_of_another_size_is_named_with_both_sizes(tmp_path: Path, name: str, size: int, change: int) -> None:
    write_store(tmp_path, *random_rows(4, 8))
    (tmp_path / name).write_bytes(bytes(size + change))
    with pytest.raises(UserError) as caught:
        RowStore(tmp_path)
    expected = f"{tmp_path / name}: holds {size + change} bytes, where meta.json says {size} (4 rows); "
    assert str(caught.value) == f"{expected}it is cut short, or not of this store: make the store again"


def test_room_behind_the_rows_is_not_read(tmp_path: Path) -> None:
    """As the PUMA paper's code leaves it, which sets room aside for as many rows as it expects."""
    labels, prompt_mask = random_rows(6, 16)
    folder = write_store(tmp_path, labels, prompt_mask, num_examples=4)
    batch = RowStore(folder)[torch.arange(4)]
    assert len(RowStore(folder)) == 4
    assert (batch.x0.numpy() == labels[:4]).all()
    assert (batch.prompt_mask.numpy() == prompt_mask[:4]).all()
    with pytest.raises(UserError, match=r"labels\.bin: holds 384 bytes, where meta.json says 256"):
        RowStore(write_store(tmp_path, labels, prompt_mask, num_examples=4, seal="ours"))


def test_the_highest_bit_first_if_meta_says_so(tmp_path: Path) -> None:
    labels, prompt_mask = random_rows(3, 16)
    write_store(tmp_path, labels, prompt_mask, prompt_mask_bitorder="big", labels_dtype="uint32")
    np.packbits(prompt_mask, axis=-1, bitorder="big").tofile(tmp_path / "prompt_mask.bin")
    assert (RowStore(tmp_path)[torch.arange(3)].prompt_mask.numpy() == prompt_mask).all()


@pytest.mark.parametrize("name", ["labels.bin", "prompt_mask.bin", "meta.json"])
def test_an_absent_file_is_named(tmp_path: Path, name: str) -> None:
    write_store(tmp_path, *random_rows(4, 8))
    (tmp_path / name).unlink()
    with pytest.raises(UserError) as caught:
        RowStore(tmp_path)
    assert f"{tmp_path / name}: cannot be read" in str(caught.value)


def test_what_is_no_store_says_what_one_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(UserError, match=r"data\.path is a folder with labels\.bin in it") as caught:
            RowStore(path)
        assert str(path / "meta.json") in str(caught.value)
