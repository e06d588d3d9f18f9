"""Files that are whole or not there: a process that dies while it writes, or a power cut, leaves the old one.

Whatever a run keeps is written by the operations in this file, so that tests can make each of them fail in turn.
"""

import os
import shutil
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write(path: Path, content: str | bytes) -> None:
    """Writes `path` aside, syncs it, and puts it in its place."""
    aside = path.with_name(f".writing_{path.name}")
    put(aside, content)
    sync(aside)
    rename(aside, path)
    sync(path.parent)


def put(path: Path, content: str | bytes) -> None:
    """Writes `path`, whole only if nothing happens meanwhile."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def put_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """As `put`, in the format of safetensors."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # how it reports a full disk, among others
        raise OSError(f"{path}: {error}") from error


def append(file: BinaryIO, content: bytes) -> None:
    """Adds to the end of an unbuffered `file` in one piece, or fails: a full disk may take half."""
    if (written := file.write(content)) != len(content):
        raise OSError(f"{file.name}: only {written} of {len(content)} bytes were written")


def sync(path: Path) -> None:
    """Waits until the file or folder `path` is on the disk."""
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
    """Deletes `folder` with all that is in it, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)
