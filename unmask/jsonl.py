"""Files of JSON objects, one a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unmask.errors import UserError


def read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of the file, with where it stands: `FILE, line 3`. Empty lines are skipped.

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
    """The object in a line.

    Raises:
        ValueError: it is none; the message says what it is.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"holds no JSON object: {str(row)[:40]}")
    return row
