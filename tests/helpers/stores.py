"""Stores of rows written by hand, and the task that reads them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmask.tasks.tokens import Tokens, TokensData

ROWS, LENGTH, VOCAB, MASK, EOS = 64, 16, 20, 19, 18


def write_store(folder: Path, labels: NDArray[Any], prompt_mask: NDArray[np.bool_], **meta: object) -> Path:
    """Writes a store (N, L) by hand; `meta` replaces values of `meta.json`."""
    folder.mkdir(exist_ok=True)
    labels.astype("<u4").tofile(folder / "labels.bin")
    np.packbits(prompt_mask, axis=-1, bitorder="little").tofile(folder / "prompt_mask.bin")
    (folder / "meta.json").write_text(json.dumps({"num_examples": len(labels), "max_len": labels.shape[1]} | meta))
    return folder


def random_rows(num_rows: int, length: int, high: int = 2**32, seed: int = 0) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, high, (num_rows, length)), rng.random((num_rows, length)) < 0.5


def make_task(**settings: Any) -> Tokens:
    defaults = {"length": LENGTH, "vocab_size": VOCAB, "mask_id": MASK, "eos_id": EOS, "prompt_length": 4}
    return Tokens.from_config(TokensData(**(defaults | settings)))


def rows_with_prompts() -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Draws rows (N, L) whose first two ids tell them apart, with prompts of 2 to 9."""
    labels, _ = random_rows(ROWS, LENGTH, high=MASK)
    labels[:, 0], labels[:, 1] = np.divmod(np.arange(ROWS), EOS)
    return labels, np.arange(LENGTH) < np.random.default_rng(1).integers(2, 10, (ROWS, 1))
