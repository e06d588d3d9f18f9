"""The error types with a message for people: a user's mistake, and a run that cannot go on."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """What the user gave cannot work.

    The message names the field or file, the value and the fix. The command line prints it without a traceback and
    exits with code 2; a library user catches it as a `ValueError`.
    """


class RunFailed(Exception):
    """A training cannot go on. What it has saved is whole.

    The message says what happened, and how to go on. The command line prints it without a traceback and exits with
    code 1.
    """


def choose(table: Mapping[str, T], what: str, name: str) -> T:
    """`table[name]`.

    Raises:
        UserError: there is none, but others are.
    """
    if name not in table:
        raise UserError(f"{what} {name!r}: unknown; use one of {', '.join(table)}")
    return table[name]


def require(is_right: bool, name: str, value: object, fix: str) -> None:
    """Raises `UserError` if `value` is not right: `name=value: give fix`."""
    if not is_right:
        raise UserError(f"{name}={value}: give {fix}")
