"""A batch of rows, tokenised, as a file: workers make them, and the end of the preparation puts them together."""

import io
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmask import durable
from unmask.errors import UserError

COUNTS = {
    "read": "rows read",
    "kept": "rows kept",
    "truncated": "of them cut short, without an end token",
    "dropped_too_long": "dropped: too long",
    "dropped_no_room": "dropped: the prompt leaves no room",
    "dropped_empty": "dropped: an empty prompt or answer",
    "dropped_short": "dropped: fewer than two tokens",
    "dropped_unknown": "dropped: nothing in it is known to the tokenizer",
    "bad": "bad rows, left out",
}
"""How many rows met which fate, and what that is called: `read` is the sum of the others without `truncated`."""


def in_words(counts: dict[str, int]) -> str:
    """The fates that rows met, for people."""
    return ", ".join(f"{counts[key]} {said}" for key, said in COUNTS.items() if counts.get(key)) or "nothing to read"


@dataclass
class Report:
    """What became of the rows of a batch.

    Attributes:
        counts: rows of each fate in `COUNTS`, those that occur.
        bad: `place` and `problem` of each bad row, in order.
    """

    counts: dict[str, int]
    bad: list[dict[str, str]]


@dataclass
class Shard:
    """The n rows that are kept of a batch, without their padding.

    Attributes:
        ids: the tokenizer's ids of all rows, one row after the other, uint32.
        num_tokens: (n,) ids of each row, the prompt's among them.
        num_prompt: (n,) ids of its prompt.
        keys: (n,) hashes of the texts, by which documents are split; none for rows that are split later.
    """

    ids: NDArray[np.uint32]
    num_tokens: NDArray[np.int64]
    num_prompt: NDArray[np.int64]
    report: Report
    keys: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))


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
    )
    durable.write(path, file.getvalue())


def load(path: Path) -> Shard:
    with _open(path) as arrays:
        return Shard(arrays["ids"], arrays["num_tokens"], arrays["num_prompt"], _report(arrays), arrays["keys"])


def load_report(path: Path) -> Report:
    """That of the shard at `path`, without reading its ids."""
    with _open(path) as arrays:
        return _report(arrays)


def load_keys(path: Path) -> NDArray[np.uint64]:
    """Those of the shard at `path`, likewise."""
    with _open(path) as arrays:
        return arrays["keys"]


def _open(path: Path) -> Any:
    try:
        return np.load(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read: {error}; delete it, and it is made again") from error


def _report(arrays: Any) -> Report:
    return Report(**json.loads(arrays["report"].tobytes()))
