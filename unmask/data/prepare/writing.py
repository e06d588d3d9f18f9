"""Shards, the files of tokenised batches that workers make, and the store that is written of them."""

import hashlib
import io
import json
import platform
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unmask import files
from unmask.data.prepare.settings import PrepareSettings
from unmask.data.prepare.sources import Row
from unmask.data.store import SEAL, make_seal
from unmask.data.vocabulary import Vocabulary
from unmask.errors import UserError

COUNTS = {
    "read": "rows read",
    "kept": "rows kept",
    "truncated": "of them cut short, without an end token",
    "shortened": "of them without their last turns",
    "dropped_too_long": "dropped: too long",
    "dropped_no_room": "dropped: the prompt leaves no room",
    "dropped_empty": "dropped: an empty prompt or answer",
    "dropped_short": "dropped: fewer than two tokens",
    "dropped_unknown": "dropped: nothing in it is known to the tokenizer",
    "bad": "bad rows, left out",
}
"""The fates of rows, and their names for display: `read` is the sum of the others without those that are "of them"."""


def describe_counts(counts: dict[str, int]) -> str:
    """Describes the fates of rows in words."""
    return ", ".join(f"{counts[key]} {name}" for key, name in COUNTS.items() if counts.get(key)) or "nothing to read"


@dataclass
class Report:
    """The fates of the rows of a batch.

    Attributes:
        counts: rows of each fate in `COUNTS`, those that occur.
        bad: `place` and `problem` of each bad row, in order.
    """

    counts: dict[str, int]
    bad: list[dict[str, str]]

    @classmethod
    def of(cls, rows: Sequence[Row], fates: Counter[str], problems: dict[int, str], num_kept: int) -> "Report":
        """Makes the report on `rows`, of which those in `problems` are bad; the others have met their `fates`."""
        counts = dict(fates) | {"read": len(rows), "kept": num_kept, "bad": len(problems)}
        return cls(counts, [{"place": rows[i].place, "problem": problems[i]} for i in sorted(problems)])


@dataclass
class Shard:
    """The n rows that are kept of a batch, without their padding.

    Attributes:
        ids: the tokenizer's ids of all rows, one row after the other, uint32.
        num_tokens: (n,) ids of each row, the prompt's among them.
        num_prompt: (n,) ids of its prompt.
        keys: (n,) hashes of the texts, by which documents are split; none for rows that are split later.
        is_given: True at ids that are given, as all users' turns are; one for each of `ids`. None at all where only
            prompts are given.
    """

    ids: NDArray[np.uint32]
    num_tokens: NDArray[np.int64]
    num_prompt: NDArray[np.int64]
    report: Report
    keys: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    is_given: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))


def save(path: Path, shard: Shard) -> None:
    """Writes `shard` whole or not at all."""
    report = json.dumps({"counts": shard.report.counts, "bad": shard.report.bad}).encode()
    file = io.BytesIO()
    np.savez(
        file,
        ids=shard.ids,
        num_tokens=shard.num_tokens,
        num_prompt=shard.num_prompt,
        keys=shard.keys,
        report=np.frombuffer(report, np.uint8),
        is_given=shard.is_given,
    )
    files.write(path, file.getvalue())


def load(path: Path) -> Shard:
    """Reads the shard at `path`."""
    with _open(path) as arrays:
        known = arrays["ids"], arrays["num_tokens"], arrays["num_prompt"], _report(arrays), arrays["keys"]
        return Shard(*known, arrays.get("is_given", np.zeros(0, np.bool_)))  # a stopped preparation may be older


def load_report(path: Path) -> Report:
    """Reads the report of the shard at `path`, without its ids."""
    with _open(path) as arrays:
        return _report(arrays)


def load_keys(path: Path) -> NDArray[np.uint64]:
    """Reads the keys of the shard at `path`, without its ids."""
    with _open(path) as arrays:
        return arrays["keys"]


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Opens a shard; what is damaged in it shows when it is read inside the context."""
    try:
        with np.load(path) as arrays:
            yield arrays
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}; delete it, and it is made again") from error


def _report(arrays: Any) -> Report:
    return Report(**json.loads(arrays["report"].tobytes()))


class NothingLeft(UserError):
    """A preparation has left out every row."""


class FinishedRows(NamedTuple):
    """n finished rows of a store: the model's ids (n, L), and which are given, of the prompt (n, L)."""

    labels: NDArray[np.uint32]
    is_prompt: NDArray[np.bool_]
    is_held_out: bool = False


FinishRows = Callable[[Sequence[Path], Vocabulary, PrepareSettings], Iterator[FinishedRows]]


class _HashedFile:
    """A file being written, and its SHA-256."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._hash = path, path.open("wb"), hashlib.sha256()

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)

    def close(self) -> str:
        """Waits until it is on the disk; returns the SHA-256."""
        self._file.close()
        files.sync(self._path)
        return self._hash.hexdigest()


def write_store(
    folder: Path,
    paths: list[Path],
    vocabulary: Vocabulary,
    settings: PrepareSettings,
    extra: dict[str, Any],
    finish_rows: FinishRows,
) -> dict[str, Any]:
    """Writes the shards at `paths` as a store into `folder`, which is made anew; returns its `meta.json`.

    Args:
        vocabulary: that of all ids.
        extra: more entries of `meta.json`.
        finish_rows: makes rows of shards; held-out rows, if any, come last.

    Raises:
        NothingLeft: no row is left.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if settings.vocab == "used":
        vocabulary = vocabulary.restrict_to(_find_used(paths, len(vocabulary.original_ids)))
    counts = _sum_counts(paths)
    if not counts["kept"]:
        raise NothingLeft(f"{settings.out}: no row is left: {describe_counts(counts)}; nothing was made")
    num_rows, checksums = _write_rows(folder, finish_rows(paths, vocabulary, settings))
    _write_bad(folder, paths)
    vocabulary.save(folder)
    meta = {
        "num_examples": sum(num_rows.values()),
        "num_held_out": num_rows[True] or None,
        "max_len": settings.length,
        "format": "unmask-rows",
        "vocab_size": vocabulary.vocab_size,
        "eos_id": vocabulary.eos_id,
        "mask_id": vocabulary.mask_id,
        "tokenizer": {"source": settings.tokenizer, "fingerprint": vocabulary.fingerprint},
        "rows": counts,
        "sha256": checksums,
        "validation_ratio": settings.validation_ratio,
        "split_seed": settings.split_seed,
    }
    meta |= extra | {"created_with": _versions()}
    meta[SEAL] = make_seal(json.loads(json.dumps(meta)))
    files.write(folder / "meta.json", json.dumps(meta, indent=1) + "\n")
    return meta


def _find_used(paths: list[Path], size: int) -> list[int]:
    """Finds the ids that occur, ascending."""
    is_used = np.zeros(size, np.bool_)
    for path in paths:
        is_used[load(path).ids] = True
    return [int(i) for i in is_used.nonzero()[0]]


def _sum_counts(paths: Sequence[Path]) -> dict[str, int]:
    """Adds up the rows of each fate, over all shards."""
    counts: Counter[str] = Counter()
    for path in paths:
        counts.update(load_report(path).counts)
    return {key: counts[key] for key in COUNTS}


def _write_rows(folder: Path, parts: Iterator[FinishedRows]) -> tuple[Counter[bool], dict[str, str]]:
    """Writes labels and prompts; returns how many rows are held out or not, and the SHA-256 of both files."""
    labels, prompts = (_HashedFile(folder / name) for name in ("labels.bin", "prompt_mask.bin"))
    num_rows: Counter[bool] = Counter()
    for part in parts:
        labels.write(part.labels.astype("<u4", copy=False).tobytes())
        prompts.write(np.packbits(part.is_prompt, axis=-1, bitorder="little").tobytes())
        num_rows[part.is_held_out] += len(part.labels)
    return num_rows, {"labels.bin": labels.close(), "prompt_mask.bin": prompts.close()}


def _write_bad(folder: Path, paths: Sequence[Path]) -> None:
    bad = [row for path in paths for row in load_report(path).bad]
    if bad:
        files.write(folder / "bad_rows.jsonl", "".join(json.dumps(row) + "\n" for row in bad))


def finish_rows(paths: Sequence[Path], vocabulary: Vocabulary, settings: PrepareSettings) -> Iterator[FinishedRows]:
    """Yields the rows of each shard at `paths`, of prompts with answers."""
    table = model_ids(vocabulary)
    for shard in map(load, paths):
        labels = np.full((len(shard.num_tokens), settings.length), vocabulary.eos_id, np.uint32)  # pads with ends
        position = np.arange(settings.length)
        is_used = position < shard.num_tokens[:, None]
        labels[is_used] = table[shard.ids]
        is_prompt = position < shard.num_prompt[:, None]
        if len(shard.is_given):
            is_prompt[is_used] |= shard.is_given
        yield FinishedRows(labels, is_prompt)


def model_ids(vocabulary: Vocabulary) -> NDArray[np.uint32]:
    """Makes the table of the model's id of each of the tokenizer's, where it has one."""
    known = [(original, i) for i, original in enumerate(vocabulary.original_ids) if original is not None]
    table = np.zeros(known[-1][0] + 1, np.uint32)
    table[[original for original, _ in known]] = [i for _, i in known]
    return table


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in ("unmask", "tokenizers", "numpy")
    }
