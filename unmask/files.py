"""Atomic writes, JSON lines, and the cache folder with its locks.

After a crash or a power cut a file is complete, or still the old one. Everything that a run keeps is written by these
functions, so that tests can make each of them fail in turn.
"""

import errno
import fcntl
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

from unmask import formats
from unmask.errors import UserError
from unmask.paths import read_input, user_path
from unmask.progress import warn
from unmask.tensor_files import Tensors, write_tensors

ASIDE = ".writing_"
"""First letters of the names of files and folders that are being written; a process that died leaves them behind."""
_STALE = 3600.0
_LINE = "the line"
WRONG_PATH = {
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
    *(errno.ELOOP, errno.EROFS, errno.EINVAL, errno.ENXIO),
}
"""Errors of the system that another path would not give; all others are the machine's."""
_LOST = "a power cut may lose what was written last"
_NO_SYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_warned: set[tuple[str, Path]] = set()
_swept: set[Path] = set()
_FOLLOWS_LINKS: ContextVar[bool] = ContextVar("follows_links", default=False)


def follow_links() -> None:
    """Lets the parts of a run be links out of its folder, in this context (`contextvars`)."""
    _FOLLOWS_LINKS.set(True)


def follows_links() -> bool:
    """True if `follow_links` was called in this context."""
    return _FOLLOWS_LINKS.get()


def write(path: Path, content: str | bytes) -> None:
    """Replaces `path` atomically: writes another file, syncs it, and renames it."""
    # Another file of a name that nobody can guess: what else may lie here, such as a link, is not written to.
    # Without the first sync the new name could survive a power cut and its content not; without the last, neither.
    aside = path.with_name(aside_name(path))
    if path.parent not in _swept:
        _swept.add(path.parent)
        sweep(path.parent, older_than=_STALE)
    try:
        put(aside, content)
        sync(aside)
        rename(aside, path)
    except (Exception, KeyboardInterrupt) as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and str(error.filename) == str(aside):  # a name that nobody has given
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    sync(path.parent)


def aside_name(path: Path) -> str:
    """Returns a name beside `path` for writing it aside, which nobody can guess."""
    return f"{ASIDE}{path.name[:50]}_{secrets.token_hex(8)}"


def place_new(source: Path, target: Path) -> None:
    """Gives the file `source` the name `target`, which nobody has.

    Raises:
        FileExistsError: there is something of that name by now; `source` stays.
    """
    sync(source)
    try:
        os.link(source, target)  # unlike a rename, it never replaces
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        rename(source, target)
    else:
        source.unlink()
    sync(target.parent)


def check_new(target: Path, where: str = "") -> None:
    """Raises `UserError`, with `where` before it, if something at `target` would have to be written over."""
    if (target.exists() or target.is_symlink()) and not target.is_dir():  # a link to nothing is somebody's too
        raise UserError(f"{where}{target}: exists already; name another one")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{where}{target} is not an empty folder; name another one")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields a folder to write into, which becomes `target`, a new or empty one, once the context ends well.

    Raises:
        UserError: no folder can be made there.
        OSError: the machine fails, as with a full disk; nothing is left then.
    """
    target = target.resolve()  # an empty folder may be a link to one on a larger disk
    aside = target.with_name(aside_name(target))
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
    try:
        yield aside
        for path in (*aside.iterdir(), aside):
            sync(path)
        with naming(target):
            rename(aside, target)
    except (Exception, KeyboardInterrupt) as error:
        remove(aside)
        if isinstance(error, OSError) and error.errno and str(error.filename).startswith(str(aside)):
            error.filename = str(target)
        raise
    sync(target.parent)


def sweep(folder: Path, *, older_than: float = 0.0) -> None:
    """Deletes what processes that died were writing in `folder`, if it is that many seconds old.

    Only who holds the folder's lock knows that nobody writes there now.
    """
    latest = time.time() - older_than
    try:
        for entry in [*os.scandir(folder)]:
            is_plain = entry.name.startswith(ASIDE) and not entry.is_dir(follow_symlinks=False)
            if is_plain and entry.stat(follow_symlinks=False).st_mtime <= latest:
                os.unlink(entry.path)  # noqa: PTH108
    except OSError:  # tidiness alone: what is to be written says what is wrong with the folder
        return


def put(path: Path, content: str | bytes) -> None:
    """Writes the new file `path` in place: a crash meanwhile leaves it incomplete.

    Raises:
        FileExistsError: there is something of that name, which may be a link.
    """
    with _new_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def put_tensors(
    path: Path, tensors: Tensors, metadata: dict[str, str] | None = None, *, outlines: Tensors | None = None
) -> None:
    """Writes `tensors` in the format of safetensors, in place as `put` does; replaces a file or link that is there.

    With their `outlines` (names, shapes and formats) each is read when its turn comes, and none is kept.
    """
    path.unlink(missing_ok=True)  # or a link would be followed
    with _new_file(path) as file:
        write_tensors(file, tensors, tensors if outlines is None else outlines, metadata)


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with naming_only(path), open(descriptor, "wb") as file:  # noqa: PTH123
        yield file


def append(file: BinaryIO, content: bytes) -> None:
    """Adds `content` to the end of an unbuffered `file` in one piece.

    Raises:
        OSError: it was not written whole, as on a full disk.
    """
    with naming_only(file.name):
        if (written := file.write(content)) != len(content):
            raise OSError(f"{file.name}: only {written} of {len(content)} bytes were written")


def sync(path: Path) -> None:
    """Waits until the file or folder `path` is on the disk (fsync); warns once where the file system has no such call.

    Raises:
        OSError: it is not on the disk; names the file.
    """
    folder = path if path.is_dir() else path.parent
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError as error:
        if path != folder:
            raise
        _warn_once(folder, f"may not be read, so it cannot be synced ({error.strerror}): {_LOST}")
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise OSError(error.errno, error.strerror, str(path)) from error
        _warn_once(folder, f"cannot be synced ({error.strerror}): {_LOST}")
    finally:
        os.close(descriptor)


def _warn_once(folder: Path, problem: str) -> None:
    if (problem, folder) not in _warned:
        _warned.add((problem, folder))
        warn(f"{folder}: {problem}")


def rename(source: Path, target: Path) -> None:
    source.replace(target)


def make_folder(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)


def remove(folder: Path) -> None:
    """Deletes `folder` and everything in it, if it exists; of a link, the link alone."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


@contextmanager
def naming_only(path: str | Path) -> Iterator[None]:
    """Names `path` in an error of the system inside the context that names no file, as of a write."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def naming(path: Path, where: str = "") -> Iterator[None]:
    """Names `path` in errors of writing it inside the context.

    Raises:
        UserError: another path would do (this one may not be written, or its folder is none); `where` stands before it.
        OSError: the machine fails, as with a full disk.
    """
    try:
        with naming_only(path):
            yield
    except OSError as error:
        if error.errno in WRONG_PATH:
            raise UserError(f"{where}{path}: cannot be written: {error.strerror}; name another one") from error
        raise


def read_json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each object of the file with its place, `FILE, line 3`. Skips empty lines.

    Raises:
        UserError: the file cannot be read, or a line is not a JSON object.
    """
    # Not `splitlines`, which also splits at characters that JSON strings may hold.
    for number, line in enumerate(read_input(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, read_object(line, where)


def read_object(line: str, where: str) -> dict[str, Any]:
    """Reads a line that is to hold a JSON object; raises `UserError`, which begins with `where`, if it holds none."""
    try:
        return parse_object(line)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def parse_object(line: str | bytes) -> dict[str, Any]:
    """Parses a line that holds a JSON object.

    Raises:
        ValueError: it holds none; the message says what it is.
    """
    try:
        row = formats.parse_json(line, _LINE)
    except UserError as error:
        raise ValueError(str(error).removeprefix(f"{_LINE}: is ")) from error
    if not isinstance(row, dict):
        raise ValueError(f"holds no JSON object: {str(row)[:40]}")
    return row


def cache_folder(asked: str | None = None) -> Path:
    """Returns the folder `asked`; default: `$UNMASK_CACHE`, or else `unmask` in the user's cache folder.

    Raises:
        UserError: no folder can have that name, or the user has no home folder.
    """
    for text, where in ((asked, "data.cache_dir="), (os.environ.get("UNMASK_CACHE"), "UNMASK_CACHE=")):
        if text:
            return user_path(text, where)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return user_path(base, "XDG_CACHE_HOME=") / "unmask"
    return user_path("~/.cache/unmask", "the cache is to be in ")


class FileLock:
    """An exclusive flock on the file `path`, which is made if missing; it ends with the process, however that ends.

    Where the file system has no locks, it warns once and locks nothing. A link in place of the file is not followed,
    and what the file holds stays.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
        OSError: the file cannot be opened for writing, or is a link or no regular file.
    """

    def __init__(self, path: Path, *, wait: bool) -> None:
        self._descriptor = open_own(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                self.close()
                raise
            problem = f"this file system has no locks ({error.strerror})"
            _warn_once(path.parent, f"{problem}: see to it that no other process writes here meanwhile")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @staticmethod
    def is_held(path: Path) -> bool:
        """True if a process holds the lock now; False too if the file is missing or cannot be read."""
        try:
            descriptor = open_own(path, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return False


def open_own(path: Path, flags: int) -> int:
    """Opens a file that only this package writes, and returns its descriptor; a link in its place is not followed.

    Raises:
        OSError: it cannot be opened, or is a link or no regular file.
    """
    # O_NONBLOCK: a fifo of that name would wait for another process.
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "is a link; delete it", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no regular file; delete it", str(path))
    return descriptor


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
