"""All measures at the last evaluation, as means over the seeds of each method.

Dimensions: n seeds of a method.
"""

import math
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from unmask.evaluation.evaluate import Cells
from unmask.evaluation.statistics import student, wilson
from unmask.lab.compare import FEWEST_SEEDS
from unmask.lab.report.curves import fewest_examples
from unmask.lab.report.measures import Measure
from unmask.lab.report.runs import RunsByMethod, common_measures


@dataclass(frozen=True)
class SeedMean:
    """The values of several seeds: shares of `examples`, if these are known, or likelihoods and the like."""

    values: tuple[float, ...]
    is_share: bool = False
    examples: int | None = None

    @property
    def value(self) -> float:
        return mean(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean: Student's, mean ± t_(n-1) s / √n; None with fewer than three seeds.

        A share has Wilson's on the examples of one evaluation, as `Comparison.finals`: Student's leaves 0 to 100 %, and
        has no width where all seeds are equal.
        """
        if self.is_share:
            return None if self.examples is None else wilson(self.value * self.examples, self.examples)
        n = len(self.values)
        if n < FEWEST_SEEDS:
            return None
        half = student(float(n - 1)) * stdev(self.values) / math.sqrt(n)
        return self.value - half, self.value + half

    def text(self) -> str:
        """Formats mean and interval: `2.211 [2.180, 2.242]`, or `31.2% [28.0, 34.5]`."""
        scale, form = (100, ".1f") if self.is_share else (1, ",.0f" if abs(self.value) >= 1000 else ".3f")
        shown = f"{scale * self.value:{form}}" + "%" * self.is_share
        ends = ", ".join(f"{scale * end:{form}}" for end in self.interval or ())
        return shown + (f" [{ends}]" if ends else "")


@dataclass(frozen=True)
class Finals:
    """The last evaluations of all methods: by measure, then method."""

    means: dict[str, dict[str, SeedMean]]

    @staticmethod
    def of(methods: RunsByMethod) -> "Finals":
        """Collects every measure that all runs have."""

        def last(measure: str, method: str) -> SeedMean:
            curves = [run.curve(measure) for run in methods[method]]
            values = tuple(curve.values[-1] for curve in curves)
            return SeedMean(values, curves[0].is_share, fewest_examples(curves))

        return Finals(
            {measure: {method: last(measure, method) for method in methods} for measure in common_measures(methods)}
        )

    def as_dict(self) -> dict[str, Any]:
        """Returns values, mean and interval as JSON values."""
        return {
            measure: {
                method: {"values": own.values, "mean": own.value, "interval": own.interval}
                for method, own in each.items()
            }
            for measure, each in self.means.items()
        }

    def table(self) -> Cells:
        """Returns a row for each measure."""
        rows = []
        for key, each in self.means.items():
            rows.append((Measure.named(key).name, *(own.text() for own in each.values())))
        return Cells(("measure", *next(iter(self.means.values()))), list(rows))
