"""Errors whose message is written for users: a mistake of theirs, a run that cannot go on, and a signal that came."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """A mistake in a setting, file or argument.

    The message names the field or file, the value and the fix. The command line prints it without a traceback and
    exits with code 2; a library user catches it as a `ValueError`.
    """


class RunFailed(Exception):
    """The end of a training that cannot go on, or of work on a model that gives no numbers. What is saved is complete.

    The message says what happened, and how to go on. The command line prints it without a traceback and exits with
    code 1.
    """


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end; the message says what is saved, and how to go on.

    No `Exception`: libraries that catch those, to try something else, must not swallow it. The command line exits with
    code 130.
    """


def choose(table: Mapping[str, T], what: str, name: str) -> T:
    """Returns `table[name]`.

    Raises:
        UserError: there is no such entry; lists the names there are.
    """
    if name not in table:
        raise UserError(f"{what} {name!r}: unknown; use one of {', '.join(table)}")
    return table[name]


def require(is_right: bool, name: str, value: object, fix: str) -> None:
    """Raises `UserError("name=value: give fix")` unless `is_right`."""
    if not is_right:
        raise UserError(f"{name}={value}: give {fix}")
