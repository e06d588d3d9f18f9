"""Warnings and progress bars. All of it goes to stderr: stdout belongs to results.

Names, answers and error messages come from files that anybody may have made: consoles show them as text, never as
markup, and escape what could steer the terminal.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from unmask.formats import printable


class TextConsole(Console):
    """A console without markup, where text has its control characters escaped."""

    def __init__(self, file: Any = None) -> None:
        super().__init__(file=file, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)  # here too, as rich drops some of them later

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        raise  # as any write to a closed pipe does; rich itself would leave the process here


class _Messages:
    """The present `sys.stderr`; messages that it does not take are lost, as no work should end for them."""

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # full, closed, or a terminal that is gone
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def _stream(self) -> Any:
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # a live display stands before the stream


console = TextConsole(_Messages())


def warn(message: str) -> None:
    """Prints a warning, in yellow."""
    console.print(f"Warning: {message}", style="yellow")


@contextmanager
def progress(description: str, total: int | None, *, is_shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Shows a bar inside the context; yields a function to call with the amount done, out of `total` if known."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns,
        console=console,
        transient=True,
        speed_estimate_period=300,
        disable=not (is_shown and console.is_terminal),
    ) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, completed=done)
