"""Warnings and progress bars. All of it goes to stderr: stdout belongs to results."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


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
