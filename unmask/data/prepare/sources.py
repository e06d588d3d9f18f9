"""Rows as they are in files, in order (`hub.py`: on the Hugging Face hub)."""

import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from unmask.errors import UserError
from unmask.jsonl import parse_object

_CHUNK = 2**20


class Row(NamedTuple):
    """A row, not yet looked at: a line of JSON, or a mapping. `number` counts lines or rows of `source` from 1."""

    source: str
    number: int
    content: bytes | dict[str, Any]

    @property
    def place(self) -> str:
        return f"{self.source}, {'line' if isinstance(self.content, bytes) else 'row'} {self.number}"

    @property
    def fields(self) -> dict[str, Any]:
        """What it holds, by name; `ValueError` if it is no JSON object."""
        return parse_object(self.content) if isinstance(self.content, bytes) else self.content


@runtime_checkable
class Source(Protocol):
    def fingerprint(self) -> dict[str, Any]:
        """What tells whether it is the same as before."""

    def num_rows(self) -> int | None:
        """How many there are, if that is known without reading them all."""

    def rows(self, fields: tuple[str, str]) -> Iterator[Row]:
        """All rows, in order.

        Raises:
            UserError: it cannot be read.
        """


class File:
    """A file of rows, of a kind that `_KINDS` knows by the end of its name."""

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()
        known = [kind for suffix, kind in _KINDS.items() if path.endswith(suffix)]
        if not known:
            raise UserError(f"{path}: unknown kind of file; use {', '.join(_KINDS)}")
        self._read = known[0]
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; name files, or none for the Hugging Face hub")

    def fingerprint(self) -> dict[str, Any]:
        """Path, size in bytes, SHA-256."""
        try:
            with self.path.open("rb") as file:
                checksum = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error}") from error
        return {"path": str(self.path), "size": self.path.stat().st_size, "sha256": checksum}

    def num_rows(self) -> int | None:
        if self._read is _parquet:
            return _open_parquet(self.path).metadata.num_rows
        if self._read is _gzipped_lines:
            return None
        with self.path.open("rb") as file:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(_CHUNK), b""))

    def rows(self, fields: tuple[str, str]) -> Iterator[Row]:
        try:
            yield from self._read(self.path, fields)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{self.path}: cannot be read, or is cut short: {error}; fetch it again") from error


def _lines(file: Iterator[bytes], path: Path) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield Row(str(path), number, line)


def _plain_lines(path: Path, fields: tuple[str, str]) -> Iterator[Row]:
    with path.open("rb") as file:
        yield from _lines(file, path)


def _gzipped_lines(path: Path, fields: tuple[str, str]) -> Iterator[Row]:
    with gzip.open(path, "rb") as file:
        yield from _lines(file, path)


def _parquet(path: Path, fields: tuple[str, str]) -> Iterator[Row]:
    file = _open_parquet(path)
    names = file.schema_arrow.names
    for field in fields:
        if field not in names:
            raise UserError(f"{path}: has no column {field!r}, but {', '.join(names)}; {_FIELDS_FIX}")
    number = count(1)
    for batch in file.iter_batches(columns=list(dict.fromkeys(fields))):
        for content in batch.to_pylist():
            yield Row(str(path), next(number), content)


def _open_parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{path}: to read Parquet files, pip install 'unmask[data]'") from error
    try:
        return ParquetFile(path)
    except (OSError, ArrowException) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {error}") from error


_FIELDS_FIX = "name the fields with --prompt-field and --answer-field"
_KINDS: dict[str, Callable[[Path, tuple[str, str]], Iterator[Row]]] = {
    ".jsonl": _plain_lines,
    ".jsonl.gz": _gzipped_lines,
    ".parquet": _parquet,
}
