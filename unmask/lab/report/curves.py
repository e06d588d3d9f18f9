"""Reads a run's metrics, and its evaluations over training as curves."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unmask import files
from unmask.errors import UserError
from unmask.training.logging import RESUMED, lines_that_count

AXES = ("step", "seconds", "examples_seen")
"""The keys of a row that say what a run has cost so far."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """The amount spent until a level was reached."""

    spent: float
    is_most: bool = False
    """True if `spent` is an upper bound: the first evaluation had reached the level already."""


@dataclass(frozen=True)
class Curve:
    """The values of one measure at each evaluation, and the amounts spent by then, by axis."""

    values: tuple[float, ...]
    spent: dict[str, tuple[float, ...]]
    is_share: bool = True
    """True for the share of examples solved, where more is better; False for a likelihood cost, where less is."""

    @staticmethod
    def of(rows: Iterable[Row], measure: str) -> "Curve":
        """Collects the lines of metrics that have a finite `measure`."""
        rows = [row for row in rows if is_finite(row.get(measure))]
        return Curve(
            values=tuple(float(row[measure]) for row in rows),
            spent={axis: tuple(float(row[axis]) for row in rows) for axis in AXES},
            is_share=measure.startswith("eval/accuracy"),
        )

    def cost(self, level: float, axis: str) -> Cost | None:
        """Returns the amount spent on `axis` when the measure first reached `level`; None if it never did.

        The measure is linearly interpolated between evaluations.
        """
        at = self.spent[axis]
        is_reached = [value >= level if self.is_share else value <= level for value in self.values]
        if not any(is_reached):
            return None
        first = is_reached.index(True)
        if first == 0:
            return Cost(at[0], is_most=True)
        before, after = self.values[first - 1 : first + 1]
        share = (level - before) / (after - before)
        return Cost(at[first - 1] + share * (at[first] - at[first - 1]))

    def at(self, steps: Sequence[float], axis: str) -> list[tuple[float, float]]:
        """Returns the amount spent on `axis` and the value at `steps` within the run, linearly interpolated."""
        own = self.spent["step"]
        spent, values = np.interp(steps, own, self.spent[axis]), np.interp(steps, own, self.values)
        return list(zip(spent.tolist(), values.tolist(), strict=True))


def is_finite(value: Any) -> bool:
    """True if `value` can be drawn: a run that diverged has written null, and a broken line may hold anything."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def read_metrics(run: Path, warn: Callable[[str], None], *, is_running: bool = False) -> list[Row]:
    """Reads the valid lines of `metrics.jsonl`, and calls `warn` for every line that is not a JSON object of metrics.

    If the run `is_running`, a last line without a newline is still being written, and is left out.

    Raises:
        UserError: the file cannot be read.
    """
    path = run / "metrics.jsonl"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if is_running:
        content = content[: content.rfind(b"\n") + 1]
    rows = []
    for number, line in lines_that_count(content):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif line:
            warn(f"{path}, line {number}: not a line of metrics; skipped")
    return rows


def _row(line: str) -> Row | None:
    try:
        row = files.parse_object(line)
    except ValueError:
        return None
    # `lines_that_count` has taken out the lines that say where a run was resumed: one that is left is damaged.
    return row if RESUMED not in row and all(is_finite(row.get(axis)) for axis in AXES) else None
