"""Methods beside each other: solve rates, what it cost to reach them, and how much sooner one is there than another.

Dimensions: n seeds of a method.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmask.report.curves import AXES, Curve

AXIS_NAMES = {"step": "steps", "seconds": "seconds", "examples_seen": "examples"}
_RESAMPLES = 10_000
FEWEST_SEEDS = 3
"""For an interval."""


@dataclass(frozen=True)
class SpeedUp:
    """Baseline's mean cost over the method's, with a 95 % interval (None with fewer than three seeds)."""

    ratio: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Level:
    """What it cost each seed of each method to reach a solve rate; None where it never did."""

    name: str
    level: float
    costs: dict[str, dict[str, list[float | None]]]
    """By method, then axis."""
    speed_ups: dict[str, dict[str, SpeedUp | None]]
    """Over the baseline, by method, then axis; None where a seed of either did not get there."""

    def cost_text(self, method: str, axis: str) -> str:
        """Mean (least to most) of the seeds that got there."""
        costs = self.costs[method][axis]
        reached = [cost for cost in costs if cost is not None]
        if not reached:
            return "not reached"
        spread = f" ({min(reached):,.0f} to {max(reached):,.0f})" if len(reached) > 1 else ""
        return f"{mean(reached):,.0f}{spread}" + (
            "" if len(reached) == len(costs) else f", {len(reached)} of {len(costs)}"
        )

    def speed_up_text(self, method: str, axis: str) -> str:
        faster = self.speed_ups[method][axis]
        if faster is None:
            return "-"
        return f"{faster.ratio:.2f}" + (
            "" if faster.interval is None else f" [{faster.interval[0]:.2f}, {faster.interval[1]:.2f}]"
        )


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
        """The shares `at`, and the baseline's own final value (the mean over its seeds)."""
        final = float(np.mean([curve.values[-1] for curve in self.methods[self.baseline]]))
        named = [(f"{level:.0%}", level) for level in at] if self.is_share else []
        named += [(f"{self.baseline}'s final {self.text(final)}", final)]
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
            "levels": [
                {
                    "name": level.name,
                    "level": level.level,
                    "costs": level.costs,
                    "speed_ups": {
                        method: {axis: None if s is None else vars(s) for axis, s in by_axis.items()}
                        for method, by_axis in level.speed_ups.items()
                    },
                }
                for level in self.levels()
            ],
        }


def speed_up(baseline: Sequence[float | None], method: Sequence[float | None]) -> SpeedUp | None:
    """`mean(baseline) / mean(method)`; the interval is the bootstrap's, over the seeds of both."""
    if any(cost is None or cost == 0 for cost in (*baseline, *method)):
        return None
    one, other = (np.array(costs, dtype=np.float64) for costs in (baseline, method))
    ratio = float(one.mean() / other.mean())
    if min(len(one), len(other)) < FEWEST_SEEDS:
        return SpeedUp(ratio, None)
    rng = np.random.default_rng(0)
    ratios = _resampled_means(one, rng) / _resampled_means(other, rng)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return SpeedUp(ratio, (float(low), float(high)))


def _resampled_means(costs: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    return rng.choice(costs, size=(_RESAMPLES, len(costs))).mean(axis=1)
