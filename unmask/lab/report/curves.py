"""A run's evaluations over training."""

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
"""What a run may cost."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """What was spent until a level was reached."""

    spent: float
    is_most: bool = False
    """The first evaluation was at the level already: it cost this at most."""


@dataclass(frozen=True)
class Curve:
    """The values of one measure at each evaluation, and what had been spent by then, by axis."""

    values: tuple[float, ...]
    spent: dict[str, tuple[float, ...]]
    is_share: bool = True
    """Of examples solved: more is better. Else it is a likelihood's cost, of which less is better."""

    @staticmethod
    def of(rows: Iterable[Row], measure: str) -> "Curve":
        """From the lines of metrics that have a finite `measure`."""
        rows = [row for row in rows if is_finite(row.get(measure))]
        return Curve(
            values=tuple(float(row[measure]) for row in rows),
            spent={axis: tuple(float(row[axis]) for row in rows) for axis in AXES},
            is_share=measure.startswith("eval/accuracy"),
        )

    def cost(self, level: float, axis: str) -> Cost | None:
        """What was spent on `axis` when the measure first reached `level`, between evaluations on a straight line."""
        at = self.spent[axis]
        first = next((i for i, value in enumerate(self.values) if self._is_at(value, level)), None)
        if first is None:
            return None
        if first == 0:
            return Cost(at[0], is_most=True)
        before, after = self.values[first - 1 : first + 1]
        share = (level - before) / (after - before)
        return Cost(at[first - 1] + share * (at[first] - at[first - 1]))

    def _is_at(self, value: float, level: float) -> bool:
        return value >= level if self.is_share else value <= level

    def at(self, steps: Sequence[float], axis: str) -> list[tuple[float, float]]:
        """What had been spent on `axis`, and the value, at `steps` within the run; on straight lines as well."""
        own = self.spent["step"]
        spent, values = np.interp(steps, own, self.spent[axis]), np.interp(steps, own, self.values)
        return list(zip(spent.tolist(), values.tolist(), strict=True))


def is_finite(value: Any) -> bool:
    """Whether it can be drawn: a run that diverged has written null; a broken line may hold anything."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def read_metrics(run: Path, warn: Callable[[str], None], *, is_running: bool = False) -> list[Row]:
    """The lines of `metrics.jsonl` that count. `warn` is told of every one that is no JSON object of metrics.

    Of a run that `is_running`, a last line that does not end yet is being written.

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
    # A line that counts and says where a run went on says so wrongly: the others are taken out.
    return row if RESUMED not in row and all(is_finite(row.get(axis)) for axis in AXES) else None
