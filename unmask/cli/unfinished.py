"""An output file that a stopped command leaves unfinished, and that the same command finishes.

`OUT.part` holds what is written so far, `OUT.part.json` what it is written of; `OUT` appears once all is there.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from unmask import files, formats
from unmask.cli.options import OUT, new_path
from unmask.config.settings import flatten
from unmask.errors import UserError


@contextmanager
def open_unfinished(out: str | Path, job: dict[str, Any], *, batch_size: int) -> Iterator[tuple[TextIO, int]]:
    """Opens the new file `out` to write lines; it has its name once the context ends well.

    Whole batches of an earlier call with the same `job` are kept, and the lines after them are cut off. Yields the
    file, whose name is still another, and the number of lines that are in it.

    Args:
        out: what the user wrote.
        job: all that the lines depend on, as JSON.
        batch_size: number of lines that are written at once.

    Raises:
        UserError: the file exists or cannot be made, its part is of another job, or another process is at it.
    """
    path = new_path(out)
    part, record = (path.with_name(path.name + suffix) for suffix in (".part", ".part.json"))
    with files.naming(path, OUT):
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not os.path.lexists(part) or not part.stat().st_size
        try:
            lock = files.FileLock(part, wait=False)
        except BlockingIOError:
            raise UserError(f"{OUT}{path}: another process is writing {part}; name another file") from None
    with lock:
        try:
            if is_new:
                with files.naming(path, OUT):
                    files.write(record, json.dumps(job, indent=1) + "\n")
            else:
                _check_job(part, record, job)
            num_lines = 0 if is_new else _cut(part, batch_size)
            with files.naming_only(part), part.open("a", encoding="utf-8") as file:
                yield file, num_lines
            with files.naming(path, OUT):
                files.place_new(part, path)
            record.unlink(missing_ok=True)
        except BaseException:
            if part.exists() and not part.stat().st_size:
                part.unlink()
                record.unlink(missing_ok=True)
            raise


def _check_job(part: Path, record: Path, job: dict[str, Any]) -> None:
    fix = "to go on, give the same again; else move it away, or name another file"
    if not os.path.lexists(record):
        raise UserError(f"{part}: holds lines of before, but {record.name}, which says of what, is gone; {fix}")
    kept: dict[str, Any] = formats.read_json(record, dict[str, Any])
    before, now = dict(flatten(kept)), dict(flatten(job))
    if different := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
        words = [f"{name} was {_shown(before.get(name))} and is {_shown(now.get(name))}" for name in different[:4]]
        raise UserError(f"{part}: is unfinished work on something else: {'; '.join(words)}. {fix.capitalize()}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:16]}.."


def _cut(part: Path, batch_size: int) -> int:
    """Cuts off what follows the last whole batch of lines, as of a process that was killed; returns the lines left."""
    content = part.read_bytes().splitlines(keepends=True)
    num_lines = sum(line.endswith(b"\n") for line in content) // batch_size * batch_size
    os.truncate(part, sum(map(len, content[:num_lines])))
    return num_lines
