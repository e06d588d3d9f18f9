"""Stores that `prepare` has made, as what can be compared."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unmask.data.store import RowStore
from unmask.types import CleanBatch


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
