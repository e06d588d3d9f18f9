"""Finds models and settings of other code: `unmask import --from SOURCE`, one module a source.

A source is a module with `OPTIONS`, the names of the options that it takes, and `find(path, **options)`, which says
what lies there. To add one: a module here, and a line in `SOURCES`.
"""

from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from unmask import files
from unmask.errors import UserError, choose
from unmask.formats import printable

SOURCES = {"hf": "unmask.training.sources.hugging_face", "puma": "unmask.training.sources.puma"}
"""The module of each source, by its name."""


@runtime_checkable
class Found(Protocol):
    """A model or settings that a source has found at a path."""

    def shown(self, target: Path | None) -> str:
        """Describes it, for stdout; empty if it is a text that will be written to `target`."""
        ...

    def write(self, target: Path) -> None:
        """Writes it to `target`, where nothing is: a model as an export, settings as a recipe.

        Raises:
            UserError: it cannot be written there.
        """
        ...

    def next_steps(self, target: Path | None) -> list[str]:
        """Returns lines about what to do with it; `target` is where it was written, if it was."""
        ...


@runtime_checkable
class Source(Protocol):
    """A module of this package."""

    OPTIONS: Collection[str]

    @staticmethod
    def find(path: Path, **options: Any) -> Found: ...


def find(source: str, path: Path, options: Mapping[str, Any], target: Path | None = None) -> Found:
    """Finds what `source` has at `path`.

    Args:
        source: a key of `SOURCES`.
        path: a folder or a file.
        options: those that were given, by name.
        target: where it will be written, if it will be.

    Raises:
        UserError: an unknown source, an option that is not its own, something at `target`, or what the source raises.
    """
    module: Source = import_module(choose(SOURCES, "--from", source))  # type: ignore[assignment]
    if wrong := [name for name in options if name not in module.OPTIONS]:
        own = ", ".join(map(_option, module.OPTIONS))
        raise UserError(f"{', '.join(map(_option, wrong))}: not for --from {source}, which takes {own}")
    if target is not None:
        files.check_new(target, "--out ")
    return module.find(path, **options)


def in_columns(found: Mapping[str, str]) -> str:
    """Returns a line for each entry, with all values in one column."""
    width = max(map(len, found))
    return "\n".join(f"{name:<{width}}  {printable(value)}" for name, value in found.items())


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
