"""Reads the rows of files, in order (`hub.py`: of the Hugging Face hub)."""

import os
import zlib
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable

from unmask import machine
from unmask.data.fingerprint import file_sha256
from unmask.data.source_files import FREE, MAX_LINE, Plausible, open_data
from unmask.errors import UserError
from unmask.files import parse_object
from unmask.paths import user_path

_CHUNK = 2**20
_MOST_ROWS = 2**12
"""Rows of Parquet that are read at once."""


PART = 2**16
"""Bytes of a text file above which it is cut into several documents, at the ends of lines."""


class TextPart(NamedTuple):
    """A stretch of a text file, still encoded; `field` is the name of its text."""

    raw: bytes
    field: str

    def decode(self) -> dict[str, Any]:
        """Decodes the text, by name. Raises `ValueError` if it is not UTF-8."""
        try:
            return {self.field: self.raw.decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            line = self.raw[: error.start].count(b"\n") + 1
            raise ValueError(
                f"not UTF-8: byte 0x{self.raw[error.start]:02x} in line {line} of it; convert the file, as with "
                "iconv -f latin1 -t utf-8"
            ) from error


class Row(NamedTuple):
    """A row, not yet parsed: a line of JSON, a mapping, or a passage of text.

    `number` counts lines or rows of `source` from 1; for a passage it is the line that it starts with.
    """

    source: str
    number: int
    content: bytes | dict[str, Any] | TextPart

    @property
    def place(self) -> str:
        unit = "row" if isinstance(self.content, dict) else "line" if isinstance(self.content, bytes) else "from line"
        return f"{self.source}, {unit} {self.number}"

    @property
    def fields(self) -> dict[str, Any]:
        """The values of the row, by name. Raises `ValueError` if it is no JSON object, or no text."""
        if isinstance(self.content, TextPart):
            return self.content.decode()
        if isinstance(self.content, bytes):
            return parse_object(self.content)
        return {name: _decoded(value, name) for name, value in self.content.items()}


def _decoded(value: Any, name: str) -> Any:
    """Decodes the bytes of a column. Raises `ValueError` if they are not UTF-8."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise ValueError(
            f"field {name!r} is not UTF-8: byte 0x{value[error.start]:02x} at its place {error.start + 1}"
        ) from error


@runtime_checkable
class RowSource(Protocol):
    """The rows of a file, a folder or a data set."""

    def fingerprint(self) -> dict[str, Any]:
        """Returns what identifies the content, as in `meta.json`."""

    def num_rows(self) -> int | None:
        """Returns the number of rows, if it is known without reading them all."""

    def rows(self, fields: tuple[str, ...]) -> Iterator[Row]:
        """Reads all rows, in order; of columns those of `fields`, or all if there are none.

        Raises:
            UserError: it cannot be read.
        """


class FileSource:
    """A file of rows, of a kind in `_KINDS`, by the end of its name."""

    def __init__(self, path: str) -> None:
        self.path = user_path(path)
        known = [kind for suffix, kind in _KINDS.items() if path.endswith(suffix)]
        if not known:
            raise UserError(f"{path}: unknown kind of file; use {', '.join(_KINDS)}")
        self._read = known[0]
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; name files, or none for the Hugging Face hub")

    def fingerprint(self) -> dict[str, Any]:
        """Returns path, size in bytes, SHA-256."""
        try:
            checksum = file_sha256(self.path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error}") from error
        return {"path": str(self.path), "size": self.path.stat().st_size, "sha256": checksum}

    def num_rows(self) -> int | None:
        if self._read is _parquet:
            return _open_parquet(self.path).metadata.num_rows
        if self._read is _passages or self.path.suffix == ".gz":
            return None
        with self.path.open("rb") as file:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(_CHUNK), b""))

    def rows(self, fields: tuple[str, ...]) -> Iterator[Row]:
        try:
            yield from self._read(self.path, fields)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{self.path}: cannot be read, or is cut short: {error}; fetch it again") from error


def _lines(path: Path, fields: tuple[str, ...]) -> Iterator[Row]:
    with open_data(path) as file:
        for number in count(1):
            line = file.readline(MAX_LINE)
            if not line:
                return
            if len(line) == MAX_LINE:
                raise UserError(f"{path}, line {number}: has more than {MAX_LINE:,} bytes, too many for a row")
            if line.strip():
                yield Row(str(path), number, line)


def _passages(path: Path, fields: tuple[str, ...]) -> Iterator[Row]:
    if len(fields) != 1:
        missing = f"fields {' and '.join(fields)}" if fields else "messages"
        raise UserError(f"{path}: text has no {missing}; give .jsonl, .jsonl.gz or .parquet")
    number = 1
    with path.open("rb") as file:
        while raw := _read_passage(file):
            yield Row(str(path), number, TextPart(raw, fields[0]))
            number += raw.count(b"\n")


def _read_passage(file: BinaryIO) -> bytes:
    """Reads the next passage, to the end of a line, or of a character where no line ends for long."""
    raw = file.read(PART)
    if not raw.endswith(b"\n"):
        raw += file.readline(PART)
    while not raw.endswith(b"\n") and (byte := file.read(1)):
        if byte[0] & 0b1100_0000 != 0b1000_0000:
            file.seek(-1, os.SEEK_CUR)
            break
        raw += byte
    return raw


def _parquet(path: Path, fields: tuple[str, ...]) -> Iterator[Row]:
    file = _open_parquet(path)
    names = file.schema_arrow.names
    fields = fields or tuple(names)
    for field in fields:
        if field not in names:
            raise UserError(f"{path}: has no column {field!r}, but {', '.join(names)}; {_FIELDS_FIX}")
    import pyarrow

    number, given = count(1), Plausible(path)
    try:
        for group in range(file.metadata.num_row_groups):
            rows = _rows_at_once(path, file.metadata.row_group(group), fields)
            for batch in file.iter_batches(rows, [group], list(dict.fromkeys(fields))):
                given.add(batch.nbytes)
                for content in _rows_of(batch, pyarrow):
                    yield Row(str(path), next(number), content)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: cannot be read as Parquet: {error}") from error


def _rows_at_once(path: Path, group: Any, fields: tuple[str, ...]) -> int:
    """Returns how many rows of a row group of Parquet take bounded memory.

    A column may keep each value once, and then repeat it in all rows. So a row takes no more than the whole group, and
    a file of a few hundred bytes may give gigabytes, if all of its rows are read at once.

    Raises:
        UserError: a group, or a value, needs more memory than there is.
    """
    columns = [group.column(number) for number in range(group.num_columns)]
    read = tuple(f"{name}." for name in fields)
    largest = sum(own.total_uncompressed_size for own in columns if f"{own.path_in_schema}.".startswith(read))
    machine.require_memory(largest, f"{path}: to read a row group of it", "write it with smaller row groups")
    return max(1, min(_MOST_ROWS, FREE // max(1, largest)))


def _rows_of(batch: Any, pyarrow: Any) -> list[dict[str, Any]]:
    """Returns the rows of a batch; where a text is not UTF-8, its column as bytes, so that each row is judged alone."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        kinds = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
        columns = [column.cast(kinds.get(column.type, column.type)).to_pylist() for column in batch.columns]
        return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


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


_FIELDS_FIX = "name the fields with --prompt-field and --answer-field; of text, with --text-field or data.field"
_KINDS: dict[str, Callable[[Path, tuple[str, ...]], Iterator[Row]]] = {
    ".jsonl": _lines,
    ".jsonl.gz": _lines,
    ".parquet": _parquet,
    **dict.fromkeys((".txt", ".md", ".rst", ".py"), _passages),
}
ENDINGS = tuple(_KINDS)
"""Endings of the names of files that can be read."""
