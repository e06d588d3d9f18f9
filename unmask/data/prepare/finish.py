"""From shards to the store."""

import hashlib
import json
import platform
import shutil
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmask import durable
from unmask.data.prepare import shards
from unmask.data.prepare.settings import Settings
from unmask.data.prepare.shards import Shard
from unmask.data.vocabulary import Vocabulary
from unmask.errors import UserError


class _Checked:
    """A file being written, and its SHA-256."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._hash = path, path.open("wb"), hashlib.sha256()

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)

    def close(self) -> str:
        """Waits until it is on the disk; returns the SHA-256."""
        self._file.close()
        durable.sync(self._path)
        return self._hash.hexdigest()


def write_store(
    folder: Path, paths: list[Path], vocabulary: Vocabulary, settings: Settings, told: dict[str, Any]
) -> dict[str, Any]:
    """Writes the shards at `paths` as a store into `folder`, which is made anew; returns its `meta.json`.

    Args:
        vocabulary: that of all ids.
        told: what else `meta.json` says.

    Raises:
        UserError: no row is left.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if settings.vocab == "used":
        vocabulary = vocabulary.keeping(_used(paths, len(vocabulary.original_ids)))
    counts, checksums = _write_rows(folder, paths, vocabulary, settings.length)
    if not counts["kept"]:
        raise UserError(f"{settings.out}: no row is left: {json.dumps(counts)}; nothing was made")
    vocabulary.save(folder)
    meta = {
        "num_examples": counts["kept"],
        "max_len": settings.length,
        "format": "unmask-rows",
        "vocab_size": vocabulary.vocab_size,
        "eos_id": vocabulary.eos_id,
        "mask_id": vocabulary.mask_id,
        "separator": settings.separator,
        "tokenizer": {"source": settings.tokenizer, "fingerprint": vocabulary.fingerprint},
        "rows": counts,
        "sha256": checksums,
        "validation_ratio": settings.validation_ratio,
        "split_seed": settings.split_seed,
    }
    meta |= told | {"created_with": _versions()}
    durable.write(folder / "meta.json", json.dumps(meta, indent=1) + "\n")
    return meta


def _used(paths: list[Path], size: int) -> list[int]:
    """The ids that occur, ascending."""
    is_used = np.zeros(size, np.bool_)
    for path in paths:
        is_used[shards.load(path).ids] = True
    return [int(i) for i in is_used.nonzero()[0]]


def _write_rows(
    folder: Path, paths: list[Path], vocabulary: Vocabulary, length: int
) -> tuple[dict[str, int], dict[str, str]]:
    """Writes labels, prompts and bad rows; returns the counts, and the SHA-256 of the first two."""
    labels, prompts, bad = (_Checked(folder / name) for name in ("labels.bin", "prompt_mask.bin", "bad_rows.jsonl"))
    model_ids = _model_ids(vocabulary)
    counts: Counter[str] = Counter()
    for shard in map(shards.load, paths):
        labels.write(_labels(shard, model_ids, vocabulary.eos_id, length).astype("<u4", copy=False).tobytes())
        is_prompt = np.arange(length) < shard.num_prompt[:, None]
        prompts.write(np.packbits(is_prompt, axis=-1, bitorder="little").tobytes())
        bad.write("".join(json.dumps(row) + "\n" for row in shard.report.bad).encode())
        counts.update(shard.report.counts)
    checksums = {"labels.bin": labels.close(), "prompt_mask.bin": prompts.close()}
    bad.close()
    if not counts["bad"]:
        (folder / "bad_rows.jsonl").unlink()
    return {key: counts[key] for key in shards.COUNTS}, checksums


def _labels(shard: Shard, model_ids: NDArray[np.uint32], eos_id: int, length: int) -> NDArray[np.uint32]:
    """The rows (n, length) of `shard` in the model's ids; the end token follows each and fills it up."""
    labels = np.full((len(shard.num_tokens), length), eos_id, np.uint32)
    labels[np.arange(length) < shard.num_tokens[:, None]] = model_ids[shard.ids]
    return labels


def _model_ids(vocabulary: Vocabulary) -> NDArray[np.uint32]:
    """The model's id of each of the tokenizer's, where it has one."""
    known = [(original, i) for i, original in enumerate(vocabulary.original_ids) if original is not None]
    table = np.zeros(known[-1][0] + 1, np.uint32)
    table[[original for original, _ in known]] = [i for _, i in known]
    return table


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in ("unmask", "tokenizers", "numpy")
    }
