"""Atomic writes, JSON lines, and the cache folder with its locks.

After a crash or a power cut a file is complete, or still the old one. Everything that a run keeps is written by these
functions, so that tests can make each of them fail in turn.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from unmask.errors import UserError


def write(path: Path, content: str | bytes) -> None:
    """Replaces `path` atomically: writes another file, syncs it, and renames it."""
    # Without the first sync the new name could survive a power cut and its content not; without the last, neither.
    aside = path.with_name(f".writing_{path.name}")
    put(aside, content)
    sync(aside)
    rename(aside, path)
    sync(path.parent)


def put(path: Path, content: str | bytes) -> None:
    """Writes `path` in place: a crash meanwhile leaves it incomplete."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def put_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes `tensors` in the format of safetensors, in place as `put` does."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # how it reports a full disk, among others
        raise OSError(f"{path}: {error}") from error


def append(file: BinaryIO, content: bytes) -> None:
    """Adds `content` to the end of an unbuffered `file` in one piece.

    Raises:
        OSError: it was not written whole, as on a full disk.
    """
    if (written := file.write(content)) != len(content):
        raise OSError(f"{file.name}: only {written} of {len(content)} bytes were written")


def sync(path: Path) -> None:
    """Waits until the file or folder `path` is on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    source.replace(target)


def make_folder(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)


def remove(folder: Path) -> None:
    """Deletes `folder` and everything in it, if it exists."""
    if folder.exists():
        shutil.rmtree(folder)


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each object of the file with its place, `FILE, line 3`. Skips empty lines.

    Raises:
        UserError: the file cannot be read, or a line is not a JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines: also where a JSON string may not end
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = parse_object(line)
            except ValueError as error:
                raise UserError(f"{where}: {error}") from error
            yield where, row


def parse_object(line: str | bytes) -> dict[str, Any]:
    """Parses a line that holds a JSON object.

    Raises:
        ValueError: it holds none; the message says what it is.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"holds no JSON object: {str(row)[:40]}")
    return row


def cache_folder(asked: str | None = None) -> Path:
    """Returns the folder `asked`; default: `$UNMASK_CACHE`, or else `unmask` in the user's cache folder."""
    if asked is not None:
        return Path(asked).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("UNMASK_CACHE", base / "unmask"))


class FileLock:
    """An exclusive flock on the file `path`, which is made if missing; it ends with the process, however that ends.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
        OSError: the file cannot be opened for writing.
    """

    def __init__(self, path: Path, *, wait: bool) -> None:
        self._file = path.open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def is_held(path: Path) -> bool:
        """True if a process holds the lock now; False too if the file is missing or cannot be read."""
        try:
            with path.open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds a lock for `path` inside the context: one process makes the file, others wait for it.

    Raises:
        UserError: its folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(path.name + ".lock"), wait=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written: {error}; set data.cache_dir or UNMASK_CACHE") from error
    with lock:
        yield
