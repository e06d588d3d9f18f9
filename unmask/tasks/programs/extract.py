"""The program in what a model says."""

import re
from collections.abc import Iterator

from unmask.tasks.programs.sandbox import MAX_LENGTH, compiling_part

_DEF = re.compile(r"^def\b", re.MULTILINE)
_FENCE = re.compile(r"[ \t]*```")
_OUR_FENCE = re.compile(r"[ \t]*```[ \t]*(python|python3|py)?[ \t]*$", re.IGNORECASE)
_PREAMBLE = re.compile(  # lines of code that no prose looks like: imports, decorators, comments, numbers with a name
    r"import [\w.]+|from [\w.]+ import |@\w|#|[A-Za-z_]\w* *= *-?[0-9][0-9._]*[ \t]*(#.*)?$"
)


def locate(text: str) -> str | None:
    """Where the program is in `text`, by its lines alone, or None: the first fenced block (```, ```python) with a `def`
    at a line start, without the fences; else all from the first such `def` on, with the imports, decorators and named
    numbers right above it.

    Takes time linear in the text, whatever it holds.
    """
    text = text.replace("\r\n", "\n")
    lines = text.split("\n")
    for block in _blocks(lines):
        if _DEF.search(block):
            return block
    for number, line in enumerate(lines):
        if _DEF.match(line):
            return "\n".join(_until_fence(lines[_preamble(lines, number) :]))
    return None


def extract(text: str) -> str | None:
    """The program in `text`, as `locate` finds it, without the trailing lines that keep it from compiling. None: none.

    Compiling is done in a sandbox, which takes a moment: `judge` does it for many texts at once.
    """
    program = locate(text)
    return program if program is None or len(program) > MAX_LENGTH else compiling_part(program)


def _blocks(lines: list[str]) -> Iterator[str]:
    """The insides of fenced blocks; one that is never closed goes on to the end."""
    start: int | None = None
    is_ours = False
    for number, line in enumerate(lines):
        if not _FENCE.match(line):
            continue
        if start is None:
            start, is_ours = number + 1, _OUR_FENCE.match(line) is not None
            continue
        if is_ours:
            yield "\n".join(lines[start:number])
        start = None
    if start is not None and is_ours:
        yield "\n".join(lines[start:])


def _until_fence(lines: list[str]) -> list[str]:
    return lines[: next((number for number, line in enumerate(lines) if _FENCE.match(line)), len(lines))]


def _preamble(lines: list[str], start: int) -> int:
    """The number of the first of the lines that belong to the `def` in line `start` and stand right above it."""
    first = start
    for number in range(start - 1, -1, -1):
        if _PREAMBLE.match(lines[number]):
            first = number
        elif lines[number].strip():
            break
    return first
