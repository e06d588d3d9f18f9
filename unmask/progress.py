"""What people see while they wait. All of it goes to stderr: stdout belongs to results."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def warn(message: str) -> None:
    """What a user should know, but need not stop for."""
    console.print(f"Warning: {message}", style="yellow")


@contextmanager
def progress(description: str, total: int | None, *, is_shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar for as long as the context lasts; yields a function that takes how much is done, of `total` if known."""
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
