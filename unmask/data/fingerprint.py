"""Checksums of data files, and what a run keeps of its data, so that it is noticed when they are others."""

import hashlib
import json
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask import files, formats
from unmask.errors import UserError
from unmask.progress import console
from unmask.types import CleanBatch

SMALL = 16 * 2**20
"""Bytes of a file that is read again at every start; the checksum of a larger one is kept until the file changes."""
_LARGE = 4 * 2**30  # bytes whose checksum takes seconds: say so
_SETTLED = 2.0  # seconds after which a change to a file is sure to change its times


@dataclass(frozen=True)
class DataFingerprint:
    """The identity of a run's data.

    Attributes:
        rows: examples, held-out ones included.
        bytes: of all examples.
        held_out: examples that are held out.
        split: what chooses them, in words.
        sha256: of all examples.
    """

    rows: int
    bytes: int
    held_out: int
    split: str
    sha256: str

    def differences(self, other: "DataFingerprint") -> str:
        """Describes in words how `other`, found now, differs from this one; empty if it does not."""
        counts = [
            f"{getattr(other, key):,} {name}, where it had {getattr(self, key):,}"
            for key, name in (("rows", "rows"), ("bytes", "bytes"), ("held_out", "rows held out"))
            if getattr(other, key) != getattr(self, key)
        ]
        split = [f"held out by {other.split}, where it was by {self.split}"] if other.split != self.split else []
        contents = [f"other contents (SHA-256 {other.sha256[:12]}.., where it was {self.sha256[:12]}..)"]
        return "; ".join(counts + split + contents * (other.sha256 != self.sha256))


def read_fingerprint(saved: Any, where: str) -> DataFingerprint | None:
    """Reads what a run saved; None for a run from before it was saved.

    Raises:
        UserError: it is something else.
    """
    found = None if saved is None else formats.checked(saved, DataFingerprint, f"{where}: data")
    return found if isinstance(found, DataFingerprint) else None


def digest(*parts: Any) -> str:
    """Returns the SHA-256 of arrays' bytes and of JSON values, one after the other."""
    checksum = hashlib.sha256()
    for part in parts:
        checksum.update(part.tobytes() if hasattr(part, "tobytes") else json.dumps(part, sort_keys=True).encode())
    return checksum.hexdigest()


def examples_digest(examples: CleanBatch) -> str:
    """Returns the SHA-256 of examples: prompts, and answers as far as they are known."""
    checksum = hashlib.sha256(examples.x0.numpy().tobytes() + examples.prompt_mask.numpy().tobytes())
    checksum.update(json.dumps(examples.answers).encode())
    return checksum.hexdigest()


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of the file `path`.

    That of a large one is kept in the cache, and taken from there while size, times and place of the file are the same.

    Raises:
        OSError: it cannot be read.
    """
    if path.stat().st_size < SMALL:
        return _compute(path)
    name = hashlib.sha256(str(path.resolve()).encode(errors="surrogateescape")).hexdigest()[:24]
    record = files.cache_folder() / "checksums" / f"{name}.json"
    try:
        with files.exclusive(record):  # one process reads the file, those beside it wait for what it finds
            return _look_up(path, record)
    except UserError:  # nothing can be kept
        return _compute(path)


def _look_up(path: Path, record: Path) -> str:
    state, held = _state(path), _read_record(record)
    if held.get("state") == state and isinstance(held.get("sha256"), str):
        return str(held["sha256"])
    started = time.time()
    found = _compute(path)
    # A file that was written a moment ago may be written once more without a change of its times.
    if _state(path) == state and max(path.stat().st_mtime, path.stat().st_ctime) < started - _SETTLED:
        with suppress(OSError):
            files.write(record, json.dumps({"path": str(path), "state": state, "sha256": found}) + "\n")
    return found


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return dict(formats.read_json(path, dict[str, Any])) if path.exists() else {}
    except (OSError, UserError):
        return {}


def _compute(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file, console.status(f"Checking {path} ..") if size >= _LARGE else nullcontext():
        return hashlib.file_digest(file, "sha256").hexdigest()
