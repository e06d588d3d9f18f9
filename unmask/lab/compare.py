"""Methods beside each other: solve rates, what it cost to reach them, and how much sooner one is there than another.

Dimensions: n seeds of a method.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, variance
from typing import Any

from unmask.evaluation.statistics import student
from unmask.lab.report.curves import AXES, Cost, Curve

AXIS_NAMES = {"step": "steps", "seconds": "seconds", "examples_seen": "examples"}
FEWEST_SEEDS = 3
"""For an interval."""


@dataclass(frozen=True)
class SpeedUp:
    """Baseline's mean cost over the method's."""

    ratio: float
    bound: str = ""
    """`≤` or `≥` where the costs of one of them are bounds."""
    interval: tuple[float, float] | None = None
    """Of 95 %; None with fewer than three seeds, or of a bound."""

    def __str__(self) -> str:
        interval = "" if self.interval is None else f" [{self.interval[0]:.2f}, {self.interval[1]:.2f}]"
        return f"{self.bound}{self.ratio:.2f}{interval}"


@dataclass(frozen=True)
class Level:
    """What it cost each seed of each method to reach a value; None where it never did."""

    name: str
    level: float
    costs: dict[str, dict[str, list[Cost | None]]]
    """By method, then axis."""
    speed_ups: dict[str, dict[str, SpeedUp | None]]
    """Over the baseline, by method, then axis; None where a seed of either did not get there, or nothing is known."""

    def cost_text(self, method: str, axis: str) -> str:
        """Mean (least to most) of the seeds that got there."""
        costs = self.costs[method][axis]
        reached = [cost for cost in costs if cost is not None]
        if not reached:
            return "not reached"
        spent = [cost.spent for cost in reached]
        most = "≤ " * any(cost.is_most for cost in reached)
        spread = f" ({min(spent):,.0f} to {max(spent):,.0f})" if len(reached) > 1 else ""
        of_all = "" if len(reached) == len(costs) else f", {len(reached)} of {len(costs)}"
        return f"{most}{mean(spent):,.0f}{spread}{of_all}"

    def speed_up_text(self, method: str, axis: str) -> str:
        return str(self.speed_ups[method][axis] or "-")


@dataclass(frozen=True)
class CostRow:
    """What a level cost on one axis, in words; `level` is named in its first row alone."""

    level: str
    axis: str
    costs: list[str]
    """By method."""
    ratios: list[str]
    """By method but the baseline."""
    is_reached: bool
    """By any seed of any method."""


@dataclass(frozen=True)
class Comparison:
    """`methods`: the curves of each method's seeds; the first method is the baseline."""

    methods: dict[str, list[Curve]]

    @property
    def baseline(self) -> str:
        return next(iter(self.methods))

    @property
    def others(self) -> list[str]:
        return list(self.methods)[1:]

    @property
    def num_seeds(self) -> int:
        """Of the method that has the fewest."""
        return min(len(curves) for curves in self.methods.values())

    @property
    def is_share(self) -> bool:
        return self.methods[self.baseline][0].is_share

    def text(self, value: float) -> str:
        """A value of the measure, for people."""
        return f"{value:.1%}" if self.is_share else f"{value:.4f}"

    def levels(self, at: Sequence[float] = (0.5, 0.9)) -> list[Level]:
        """The shares `at`, and what every seed of the baseline got to: the final value of its worst."""
        finals = [curve.values[-1] for curve in self.methods[self.baseline]]
        worst = min(finals) if self.is_share else max(finals)
        named = [(f"{level:.0%}", level) for level in at] if self.is_share else []
        of_seeds = ", worst seed" if len(finals) > 1 else ""
        named += [(f"{self.baseline}'s final{of_seeds} {self.text(worst)}", worst)]
        return [self._level(name, level) for name, level in named if level > 0]  # 0 is reached before the start

    def _level(self, name: str, level: float) -> Level:
        costs = {
            method: {axis: [curve.cost(level, axis) for curve in curves] for axis in AXES}
            for method, curves in self.methods.items()
        }
        return Level(
            name=name,
            level=level,
            costs=costs,
            speed_ups={
                method: {axis: speed_up(costs[self.baseline][axis], own[axis]) for axis in AXES}
                for method, own in costs.items()
                if method != self.baseline
            },
        )

    def rows(self) -> list["CostRow"]:
        """Levels, axis by axis, for a table."""
        return [
            CostRow(
                level=level.name if axis == AXES[0] else "",
                axis=AXIS_NAMES[axis],
                costs=[level.cost_text(method, axis) for method in self.methods],
                ratios=[level.speed_up_text(method, axis) for method in self.others],
                is_reached=any(cost is not None for own in level.costs.values() for cost in own[axis]),
            )
            for level in self.levels()
            for axis in AXES
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "baseline": self.baseline,
            "curves": {
                method: [{"values": curve.values, **curve.spent} for curve in curves]
                for method, curves in self.methods.items()
            },
            "levels": [asdict(level) for level in self.levels()],
        }


def speed_up(baseline: Sequence[Cost | None], method: Sequence[Cost | None]) -> SpeedUp | None:
    """`mean(baseline) / mean(method)`, with Student's interval of its logarithm.

    Its variance is `s1^2 / (n1 m1^2) + s2^2 / (n2 m2^2)` for means m, standard deviations s and n seeds, to first
    order; Welch's degrees of freedom.
    """
    one, other = ([cost for cost in costs if cost is not None] for costs in (baseline, method))
    if len(one) < len(baseline) or len(other) < len(method) or any(cost.spent == 0 for cost in (*one, *other)):
        return None
    ratio = mean(cost.spent for cost in one) / mean(cost.spent for cost in other)
    is_most, is_least = (any(cost.is_most for cost in costs) for costs in (one, other))
    if is_most or is_least:
        return None if is_most and is_least else SpeedUp(ratio, "≤ " if is_most else "≥ ")
    terms = [_relative_variance([cost.spent for cost in costs]) for costs in (one, other)]
    if min(len(one), len(other)) < FEWEST_SEEDS or not any(terms):
        return SpeedUp(ratio)
    degrees = sum(terms) ** 2 / sum(term**2 / (len(costs) - 1) for term, costs in zip(terms, (one, other), strict=True))
    factor = math.exp(student(degrees) * math.sqrt(sum(terms)))
    return SpeedUp(ratio, interval=(ratio / factor, ratio * factor))


def _relative_variance(costs: Sequence[float]) -> float:
    """Of their mean, over its square."""
    return variance(costs) / len(costs) / mean(costs) ** 2 if len(costs) > 1 else 0.0
