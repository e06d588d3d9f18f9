"""`metrics.jsonl`: JSON lines to which a run only ever adds, and which of them count.

A run that is resumed goes on from its checkpoint. What it had written since lies behind `position`, the file's length
when the checkpoint was made: a line with the key `resumed_at_byte` takes back all from there up to itself.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unmask import durable, jsonl
from unmask.progress import warn

RESUMED = "resumed_at_byte"
"""Its line takes back what is behind that byte."""


class MetricsFile:
    """Where a run writes its lines."""

    def __init__(self, path: Path, position: int, head: dict[str, Any]) -> None:
        """Goes on from `position`, where the step and what else is in `head` had been reached."""
        self.path = path
        size = path.stat().st_size if path.exists() else 0
        if size < position:
            warn(f"{path}: shorter than when the checkpoint was made; lines are lost")
        is_cut_short = size > 0 and not _ends_a_line(path)
        self._file = path.open("ab", buffering=0)
        durable.sync(path.parent)  # its name there
        if is_cut_short:
            durable.append(self._file, b"\n")
        if size > position:
            self.write(head | {RESUMED: position})

    @property
    def position(self) -> int:
        """Where the next line goes."""
        return self._file.tell()

    def sync(self) -> None:
        """Waits until all lines are on the disk."""
        durable.sync(self.path)

    def write(self, line: dict[str, Any]) -> None:
        """Numbers that are not finite become null: JSON has no other name for them."""
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}
        durable.append(self._file, json.dumps(finite, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


def lines_that_count(content: bytes) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line of a `metrics.jsonl` that no resumed run has taken back."""
    kept: list[tuple[int, int, bytes]] = []
    start = 0
    for number, line in enumerate(content.split(b"\n"), start=1):
        position = _resumed_at(line)
        if position is None:
            kept.append((start, number, line))
        while position is not None and kept and kept[-1][0] >= position:
            kept.pop()
        start += len(line) + 1
    for _, number, line in kept:
        yield number, line.decode(errors="replace")


def _resumed_at(line: bytes) -> int | None:
    """None if the line does not say, or says no position."""
    if RESUMED.encode() not in line:
        return None
    try:
        position = jsonl.parse_object(line).get(RESUMED)
    except ValueError:
        return None
    return position if type(position) is int and position >= 0 else None


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"
