"""What is made once and kept on disk, shared by all runs, safe for processes that ask at the same time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unmask.errors import UserError


def folder(asked: str | None = None) -> Path:
    """What was `asked` for, `$UNMASK_CACHE`, or `unmask` in the user's cache folder."""
    if asked is not None:
        return Path(asked).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("UNMASK_CACHE", base / "unmask"))


@contextmanager
def held(path: Path) -> Iterator[None]:
    """A lock on what is to be at `path`: the first process makes it, others wait for it.

    Raises:
        UserError: its folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(path.name + ".lock").open("w")
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written: {error}; set data.cache_dir or UNMASK_CACHE") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
