"""Opens data files that anybody may have made: regular ones alone, and of compressed ones no more than is plausible."""

import gzip
import io
from pathlib import Path
from typing import Any

from unmask import machine
from unmask.errors import UserError
from unmask.paths import existing_file

FREE = 2**28
"""Bytes that any compressed file may give."""
_MOST_RATIO = 100
"""Most bytes, beyond those, for each compressed byte; text gives 3 to 20."""
MAX_LINE = 2**26
"""Most bytes of a line."""


def open_data(path: Path) -> io.BufferedReader:
    """Opens a regular file for reading; decompressed if its name ends in `.gz`.

    Raises:
        UserError: it is no such file; later, from `read`, it is compressed as no data are.
    """
    path = existing_file(path)
    try:
        if path.suffix == ".gz":
            return io.BufferedReader(_Decompressed(path), 2**20)
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


class Plausible:
    """Counts the bytes that the compressed file `path` gives, up to as much as one of its size may plausibly hold."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._most = FREE + _MOST_RATIO * path.stat().st_size
        self._read = 0

    def add(self, number: int) -> None:
        """Counts `number` bytes more.

        Raises:
            UserError: these are too many.
        """
        self._read += number
        if self._read > self._most:
            raise UserError(
                f"{self._path}: gives more than {self._most:,} bytes, over {_MOST_RATIO} for each of its own, as no "
                "data do; write it without compression if it is what it should be"
            )


class _Decompressed(io.RawIOBase):
    """The content of a gzip file."""

    def __init__(self, path: Path) -> None:
        self._file = gzip.open(path, "rb")  # noqa: SIM115 - closed with this file
        self._given = Plausible(path)

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        number = self._file.readinto(target)
        self._given.add(number)
        return number

    def close(self) -> None:
        self._file.close()
        super().close()


def read_data(path: Path) -> bytes:
    """Reads a regular file whole, decompressed if its name ends in `.gz`.

    Raises:
        UserError: as `open_data`, or it does not fit in memory.
        OSError, EOFError, zlib.error: it cannot be read, or is damaged.
    """
    fix = "split it into several files"
    parts, size = [], 0
    with open_data(path) as file:
        machine.require_memory(path.stat().st_size, f"{path}: to read it", fix)
        while part := file.read(2**26):
            parts.append(part)
            size += len(part)
            machine.require_memory(2 * size, f"{path}: to read it", fix)
    return b"".join(parts)
