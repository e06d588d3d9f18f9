"""A run's evaluations over training."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.errors import UserError
from unmask.training.metrics import lines_that_count

AXES = ("step", "seconds", "examples_seen")
"""What a run may cost."""

Row = dict[str, Any]


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

    def cost(self, level: float, axis: str) -> float | None:
        """What was spent on `axis` when the measure first reached `level`, between evaluations on a straight line."""
        at = self.spent[axis]
        for i, value in enumerate(self.values):
            if value >= level if self.is_share else value <= level:
                if i == 0 or value == self.values[i - 1]:
                    return at[i]
                share = (level - self.values[i - 1]) / (value - self.values[i - 1])
                return at[i - 1] + share * (at[i] - at[i - 1])
        return None


def is_finite(value: Any) -> bool:
    """Whether it can be drawn: a run that diverged has written NaN."""
    return isinstance(value, int | float) and math.isfinite(value)


def read_metrics(run: Path, warn: Callable[[str], None]) -> list[Row]:
    """The lines of `metrics.jsonl` that count. `warn` is told of every one that is no JSON object of metrics.

    Raises:
        UserError: the file cannot be read.
    """
    path = run / "metrics.jsonl"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    rows = []
    for number, line in lines_that_count(content):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and all(is_finite(row.get(axis)) for axis in AXES):
            rows.append(row)
        else:
            warn(f"{path}, line {number}: not a line of metrics; skipped")
    return rows
