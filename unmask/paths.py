"""Paths that users write, and the text that they give: files, pipes and stdin.

Every path that comes from a setting or an option goes through here before it is used.
"""

import errno
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from unmask import formats
from unmask.errors import UserError

MAX_INPUT = 2**30
"""Most bytes of prompts or rows that are read at once."""
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def user_path(text: str | Path, where: str = "") -> Path:
    """Returns a path that a user wrote, with `~` replaced; it need not exist. `where` stands before it in errors.

    Raises:
        UserError: no file can have that name.
    """
    if text == "":  # as of a variable that is not set; a path of it would be the current folder
        raise UserError(f"{where}'': is empty; name a file or folder")
    path = Path(text)
    try:
        path = path.expanduser()
        path.stat()
    except RuntimeError as error:
        raise UserError(f"{where}{text}: whose home folder is that? Write the path in full") from error
    except ValueError as error:
        raise UserError(f"{where}{str(text)!r}: no file can have that name: {error}") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise UserError(f"{where}{text}: cannot be read: {error.strerror}; name another one") from error
    return path


def existing_file(text: str | Path, where: str = "") -> Path:
    """Returns the path of a regular file that a user wrote.

    Raises:
        UserError: there is none of that name, or it is something else: a folder, a fifo, a device.
    """
    path = user_path(text, where)
    kind = _kind(path, where)
    if kind != "file":
        raise UserError(f"{where}{text}: cannot be read: {f'is a {kind}' if kind else 'no such file'}; name a file")
    return path


def existing_folder(text: str | Path) -> Path:
    """Returns the path of a folder that a user wrote.

    Raises:
        UserError: there is none of that name.
    """
    path = user_path(text)
    kind = _kind(path)
    if kind != "folder":
        raise UserError(f"{text}: {f'is a {kind}, not a folder' if kind else 'no such folder'}; name a folder")
    return path


def _kind(path: Path, where: str = "") -> str | None:
    """Returns what `path` is, in a word; None if it does not exist."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{where}{path}: cannot be read: {error.strerror}") from error
    return _KINDS.get(stat.S_IFMT(mode), "special file")


def read_input(text: str | Path) -> str:
    """Reads UTF-8 text that a user gives: a regular file, or what is open already, as `/dev/stdin` and `<(..)` are.

    Raises:
        UserError: it cannot be read, or is not UTF-8; names the line.
    """
    path = user_path(text)
    # A fifo in a folder is not read: it might wait for its writer for ever.
    is_open = path.is_absolute() and os.path.realpath(path).startswith(("/proc/", "/dev/fd/", "/dev/stdin"))
    if not (is_open and _kind(path) in ("fifo", "socket")):
        return formats.read_text(existing_file(path), max_bytes=MAX_INPUT)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_INPUT + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_INPUT:
        raise UserError(f"{path}: has more than {MAX_INPUT:,} bytes; give it in parts")
    return formats.decode(content, str(path))


def stdin_lines() -> Iterator[str]:
    """Yields the lines of UTF-8 text that come from stdin, as they come.

    Raises:
        UserError: a line is not UTF-8, or all of them are too long; names the line.
    """
    size = 0
    for number, line in enumerate(getattr(sys.stdin, "buffer", sys.stdin), start=1):
        if (size := size + len(line)) > MAX_INPUT:
            raise UserError(f"stdin: has more than {MAX_INPUT:,} bytes; give it in parts")
        if isinstance(line, bytes):
            line = formats.decode(line, "stdin", first_line=number)
        yield line.removesuffix("\n")
