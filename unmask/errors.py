"""Errors whose message is written for users: a mistake of theirs, a run that cannot go on, and a signal that came."""

import math
from collections.abc import Iterable, Mapping
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


class NotFinite(RunFailed):
    """A model gives numbers that are not finite, so that nothing can be decoded from it or measured of it.

    A training goes on after an evaluation that ends so. It ends so itself before it would save such weights.
    """


def first_line(error: Exception) -> str:
    """Returns the first line of another library's message, or the error's type if it has none.

    If that ends with a colon, the next line, which has the reason, follows.
    """
    first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {more[0]}" if first.endswith(":") and more else first


NOT_FINITE_FIX = (
    "its weights are not finite, or too large for the dtype it computes in; use another checkpoint, or float32"
)


def check_finite(values: Iterable[float], model: str, what: str, numbers: Iterable[int]) -> None:
    """Checks the values that `model` gives for `what`, an example or a text, of these numbers.

    Raises:
        NotFinite: one of them is nan or inf.
    """
    for value, number in zip(values, numbers, strict=True):
        if not math.isfinite(value):
            raise NotFinite(f"{model} gives {value} for {what} {number}: {NOT_FINITE_FIX}")


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
