"""Files that are whole or not there: a process that dies while it writes, or a power cut, leaves the old one."""

import os
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    """Writes `path` aside, syncs it, and puts it in its place."""
    aside = path.with_name(f".writing_{path.name}")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(aside)
    aside.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until the file or folder `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
