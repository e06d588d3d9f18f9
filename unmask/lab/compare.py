"""Compares methods: plans their trainings, and measures what each method spends to reach a solve rate.

Dimensions: n seeds of a method.
"""

import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean, variance
from typing import Any

from unmask.config import recipes
from unmask.config.run import RunConfig
from unmask.config.settings import quoted
from unmask.errors import UserError
from unmask.evaluation.statistics import share_text, student, wilson
from unmask.lab.report.curves import AXES, Cost, Curve, fewest_examples, known_axes
from unmask.lab.report.runs import MOST_METHODS, RunsByMethod, read_run
from unmask.lab.trainings import Training, check_budget
from unmask.training.evaluating import rates
from unmask.training.folder import RunFolder

AXIS_NAMES = {"step": "steps", "seconds": "seconds", "passes": "passes", "examples_seen": "examples"}
FEWEST_SEEDS = 3
"""Smallest number of seeds for an interval."""


@dataclass(frozen=True)
class Method:
    """A recipe with settings of its own, and the name that its curves and its folder have."""

    name: str
    recipe: str
    settings: tuple[str, ...] = ()

    @staticmethod
    def of_recipe(recipe: str) -> "Method":
        """Returns the method that is the recipe as it stands."""
        return Method(recipes.short_name(recipe), recipe)

    @staticmethod
    def parse(text: str) -> "Method":
        """Reads `NAME: RECIPE [key=value]..`, in which quotes hold together what has spaces, as in a shell.

        Raises:
            UserError: it is not of this form, or the name cannot be that of a folder.
        """
        where = f"--method {quoted(text)}"
        name, colon, rest = text.partition(":")
        name = name.strip()
        if not colon or "=" in name:
            raise UserError(f"{where}: write 'NAME: RECIPE key=value ..', such as 'muon: sudoku/puma optim.name=muon'")
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{where}: the name {quoted(name)} is a folder's too; take up to 40 letters, digits and . _ - +"
            )
        try:
            recipe, *settings = shlex.split(rest) or [""]
        except ValueError as error:
            raise UserError(f"{where}: {error}; quote a value with spaces as in 'process={{name: puma}}'") from None
        if not recipe or "=" in recipe:
            raise UserError(f"{where}: the recipe is missing; write 'NAME: RECIPE key=value ..'")
        if wrong := [word for word in settings if "=" not in word]:
            raise UserError(f"{where}: {quoted(wrong[0])} is no key=value; give one recipe, then settings")
        return Method(name, recipe, tuple(settings))


RESULTS = ("comparison.json", "report.html")
"""The files that a comparison writes, beside its runs."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,39}")


@dataclass(frozen=True)
class Plan:
    """The trainings of each method, one for each seed, and their configurations; the first method is the baseline."""

    methods: dict[str, list[Training]]
    configs: dict[Training, RunConfig]

    @staticmethod
    def make(methods: Sequence[Method], settings: Sequence[str], *, seeds: int, out: Path) -> "Plan":
        """Plans `seeds` trainings of each method, in folders within `out`, such as sudoku-puma/seed_0.

        A method's own settings are written over `settings`, which are for all of them.

        Raises:
            UserError: the methods cannot be compared, or one of them is wrong.
        """
        folders = [method.name.replace("/", "-") for method in methods]
        names = " ".join(method.name for method in methods)
        if len(methods) < 2 or len({folder.casefold() for folder in folders}) < len(folders):
            raise UserError(
                f"compare {names}: give two recipes or more, each once and of another name; for one recipe with "
                "other settings, --method 'NAME: RECIPE key=value ..'"
            )
        if taken := [method.name for method, folder in zip(methods, folders, strict=True) if folder in RESULTS]:
            raise UserError(
                f"compare {taken[0]}: is the name of a file that a comparison writes; name the method otherwise"
            )
        if len(methods) > MOST_METHODS:
            raise UserError(
                f"compare: {len(methods)} recipes are more than a page can tell apart; give {MOST_METHODS} at most"
            )
        for setting in (*settings, *(own for method in methods for own in method.settings)):
            if recipes.gives(setting, "train.seed"):
                raise UserError(f"{setting}: a comparison trains the seeds 0, 1, .. of every method; give --seeds")
        trainings = {
            method.name: [
                Training(
                    method.recipe, (*settings, *method.settings, f"train.seed={seed}"), out / folder / f"seed_{seed}"
                )
                for seed in range(seeds)
            ]
            for method, folder in zip(methods, folders, strict=True)
        }
        configs = {own: recipes.load(own.recipe, own.settings) for each in trainings.values() for own in each}
        if len(tasks := {config.task.name for config in configs.values()}) > 1:
            raise UserError(f"compare {names}: of different tasks ({', '.join(sorted(tasks))}); give one task's")
        firsts = [(name, configs[each[0]]) for name, each in trainings.items()]
        for (one, config), (other, same) in combinations(firsts, 2):
            if config == same:
                raise UserError(f"compare {names}: {one} and {other} have the same settings; let them differ in one")
        return Plan(trainings, configs)

    @property
    def queue(self) -> list[Training]:
        """All trainings in the order in which to start them: seed by seed."""
        return [own for of_one_seed in zip(*self.methods.values(), strict=True) for own in of_one_seed]

    def check_folders(self) -> None:
        """Checks that every training can start, or go on with what is in its folder.

        Raises:
            UserError: a folder holds another training.
        """
        for training in self.queue:
            try:
                RunFolder(training.folder).check(self.configs[training], resume=True)
            except UserError as error:
                raise UserError(f"{error}\nOr name the method otherwise, or another folder with --out") from None
            check_budget(training.folder, self.configs[training])

    def read_runs(self, warn: Callable[[str], None]) -> RunsByMethod:
        """Reads the runs that the trainings have made."""
        return {method: [read_run(own.folder, warn) for own in each] for method, each in self.methods.items()}


def choose_measure(measure: str | None, configs: Sequence[RunConfig]) -> str:
    """Returns the measure to compare by: `measure`, or (if None) the first rate that all evaluate, or else the NELBO.

    Raises:
        UserError: not all of the runs evaluate it.
    """
    common = [rate for rate in rates(configs[0]) if all(rate in rates(config) for config in configs)]
    common += ["eval/nelbo"]
    if rates(configs[0]) and len(common) == 1 and measure is None:
        raise UserError(
            "--measure: these recipes evaluate no rate in common; set eval.* alike for all, or give eval/nelbo"
        )
    if measure not in (None, *common):
        raise UserError(f"--measure {measure}: not what all of these recipes evaluate; give one of {', '.join(common)}")
    return measure or common[0]


@dataclass(frozen=True)
class SpeedUp:
    """The baseline's mean cost divided by the method's."""

    ratio: float
    bound: str = ""
    """`≤` or `≥` if the costs of one of them are bounds."""
    interval: tuple[float, float] | None = None
    """The 95 % interval; None with fewer than three seeds, or if the ratio is a bound."""

    def __str__(self) -> str:
        interval = "" if self.interval is None else f" [{self.interval[0]:.2f}, {self.interval[1]:.2f}]"
        return f"{self.bound}{self.ratio:.2f}{interval}"


@dataclass(frozen=True)
class LevelCosts:
    """The cost of reaching one value of the measure."""

    name: str
    level: float
    costs: dict[str, dict[str, list[Cost]]]
    """The cost of each seed, by method, then axis; a bound for a seed that never reached the level."""
    speed_ups: dict[str, dict[str, SpeedUp | None]]
    """Over the baseline, by method, then axis; None if nothing is known, or if the level is another method's."""

    def cost_text(self, method: str, axis: str) -> str:
        """Formats the mean (least to most) of the seeds that reached the level."""
        costs = self.costs[method][axis]
        spent = [cost.spent for cost in costs if not cost.is_least]
        if not spent:
            return "not reached"
        most = "≤ " * any(cost.is_most for cost in costs)
        spread = f" ({_amount(min(spent))} to {_amount(max(spent))})" if len(spent) > 1 else ""
        of_all = "" if len(spent) == len(costs) else f", {len(spent)} of {len(costs)}"
        return f"{most}{_amount(mean(spent))}{spread}{of_all}"

    def speed_up_text(self, method: str, axis: str) -> str:
        return str(self.speed_ups[method][axis] or "-")


def _amount(spent: float) -> str:
    """Formats what was spent; of a few seconds, the tenths count too."""
    return f"{spent:,.1f}" if spent < 10 and spent != round(spent) else f"{spent:,.0f}"


@dataclass(frozen=True)
class CostRow:
    """A row of the table of costs: one level on one axis, as text."""

    level: str
    """The level's name in its first row, empty in the others."""
    axis: str
    costs: list[str]
    """One for each method."""
    ratios: list[str]
    """One for each method but the baseline."""
    is_reached: bool
    """True if any seed of any method reached the level."""


@dataclass(frozen=True)
class Comparison:
    """The curves of each method's seeds; the first method is the baseline."""

    methods: dict[str, list[Curve]]

    @staticmethod
    def of(methods: RunsByMethod, measure: str) -> "Comparison":
        """Compares runs by `measure`."""
        return Comparison({method: [run.curve(measure) for run in runs] for method, runs in methods.items()})

    @property
    def baseline(self) -> str:
        return next(iter(self.methods))

    @property
    def others(self) -> list[str]:
        return list(self.methods)[1:]

    @property
    def num_seeds(self) -> int:
        """The number of seeds of the method that has the fewest."""
        return min(len(curves) for curves in self.methods.values())

    @property
    def num_runs(self) -> int:
        return sum(map(len, self.methods.values()))

    @property
    def axes(self) -> list[str]:
        """Lists the axes that are known of all runs."""
        return known_axes(curve.spent for curves in self.methods.values() for curve in curves)

    @property
    def is_share(self) -> bool:
        return self.methods[self.baseline][0].is_share

    def text(self, value: float) -> str:
        """Formats a value of the measure."""
        return f"{value:.1%}" if self.is_share else f"{value:.4f}"

    def mean_text(self, values: Sequence[float], examples: int | None = None) -> str:
        """Formats the mean (least to most) of several seeds' values; a share's with its interval, on the `examples`."""
        least, most = (self.text(end).rstrip("%") for end in (min(values), max(values)))
        shown = share_text(mean(values) * examples, examples) if examples else self.text(mean(values))
        return shown + (f" ({least} to {most})" if len(values) > 1 else "")

    def num_examples(self, method: str) -> int | None:
        """Returns the number of examples of an evaluation, the fewest of all seeds; None for likelihoods, or unknown.

        All seeds are evaluated on the same examples. So the interval of a share is that of their mean on the examples
        of one evaluation, not of one: more seeds make it no narrower.
        """
        return fewest_examples(self.methods[method])

    def finals(self) -> list[list[str]]:
        """Lists each method's last evaluation: its name, value, Wilson interval, and what was spent by then, by axis.

        The interval is empty where the number of examples is not known, as for likelihoods.
        """
        rows = []
        for method, curves in self.methods.items():
            last = [curve.values[-1] for curve in curves]
            n = self.num_examples(method)
            low, high = wilson(mean(last) * n, n) if n else (math.nan, math.nan)
            spent = (_amount(mean(curve.spent[axis][-1] for curve in curves)) for axis in self.axes)
            rows.append([method, self.mean_text(last), f"{100 * low:.1f} to {100 * high:.1f}" if n else "", *spent])
        return rows

    def short_of_baseline(self) -> list[str]:
        """Lists the methods whose seeds did not all come to the baseline's final value, after fewer steps than it took.

        Costs are then read where the baseline's learning rate had not come down yet, if it does.
        """
        steps = {method: max(curve.spent["step"][-1] for curve in own) for method, own in self.methods.items()}
        sign = 1 if self.is_share else -1
        worst = {method: min(sign * curve.final for curve in own) for method, own in self.methods.items()}
        base = self.baseline
        return [each for each in self.others if steps[each] < steps[base] and worst[each] < worst[base]]

    def levels(self, at: Sequence[float] = (0.5, 0.9)) -> list[LevelCosts]:
        """Lists the levels: the shares `at`, and for each method the value that it and the baseline both reached.

        That is the worst final value of all seeds of the two. A value taken from the baseline alone would favour the
        other: where chance held the baseline back, it is low, and where chance held the other back, it is not reached,
        so that no ratio comes out. Taken from both alike, equal methods have a ratio of 1 but for the noise.
        """
        worst = min if self.is_share else max
        finals = {method: worst(curve.final for curve in curves) for method, curves in self.methods.items()}
        common: dict[float, list[str]] = {}
        for method in self.others:
            common.setdefault(worst(finals[self.baseline], finals[method]), []).append(method)
        levels = [self._level(f"{level:.0%}", level, self.others) for level in at if self.is_share]
        for level, others in common.items():
            every = "every seed of " if self.num_runs > len(self.methods) else ""
            name = f"{self.text(level)}, where {every}{' and '.join([self.baseline, *others])} came"
            levels.append(self._level(name, level, others))
        return [level for level in levels if level.level > 0 or not self.is_share]  # 0 is reached before the start

    def _level(self, name: str, level: float, others: Sequence[str]) -> LevelCosts:
        costs = {
            method: {axis: [curve.cost(level, axis) for curve in curves] for axis in self.axes}
            for method, curves in self.methods.items()
        }
        return LevelCosts(
            name=name,
            level=level,
            costs=costs,
            speed_ups={
                method: {
                    axis: speed_up(costs[self.baseline][axis], costs[method][axis]) if method in others else None
                    for axis in self.axes
                }
                for method in self.others
            },
        )

    def rows(self) -> list[CostRow]:
        """Lists the rows of the table of costs: levels, axis by axis."""
        return [
            CostRow(
                level=level.name if axis == AXES[0] else "",
                axis=AXIS_NAMES[axis],
                costs=[level.cost_text(method, axis) for method in self.methods],
                ratios=[level.speed_up_text(method, axis) for method in self.others],
                is_reached=any(not cost.is_least for own in level.costs.values() for cost in own[axis]),
            )
            for level in self.levels()
            for axis in self.axes
        ]

    def as_dict(self) -> dict[str, Any]:
        """Returns the comparison as JSON values."""
        return {
            "baseline": self.baseline,
            "curves": {
                method: [{"values": curve.values, **curve.spent} for curve in curves]
                for method, curves in self.methods.items()
            },
            "levels": [asdict(level) for level in self.levels()],
        }


def speed_up(baseline: Sequence[Cost], method: Sequence[Cost]) -> SpeedUp | None:
    """Computes `mean(baseline) / mean(method)`, with Student's interval of its logarithm; None if nothing is known.

    To first order, the variance of the logarithm is `s1^2 / (n1 m1^2) + s2^2 / (n2 m2^2)` for means m, standard
    deviations s and n seeds. The degrees of freedom are Welch's. A bound on a cost bounds the ratio.
    """
    if any(cost.spent <= 0 for cost in (*baseline, *method)):
        return None
    ratio = mean(cost.spent for cost in baseline) / mean(cost.spent for cost in method)
    is_most = any(cost.is_most for cost in baseline) or any(cost.is_least for cost in method)
    is_least = any(cost.is_least for cost in baseline) or any(cost.is_most for cost in method)
    if is_most or is_least:
        return None if is_most and is_least else SpeedUp(ratio, "≤ " if is_most else "≥ ")
    terms = [_relative_variance([cost.spent for cost in costs]) for costs in (baseline, method)]
    if min(len(baseline), len(method)) < FEWEST_SEEDS or not any(terms):
        return SpeedUp(ratio)
    degrees = sum(terms) ** 2 / sum(
        term**2 / (len(costs) - 1) for term, costs in zip(terms, (baseline, method), strict=True)
    )
    factor = math.exp(student(degrees) * math.sqrt(sum(terms)))
    return SpeedUp(ratio, interval=(ratio / factor, ratio * factor))


def _relative_variance(costs: Sequence[float]) -> float:
    """Computes the variance of the mean, divided by the squared mean."""
    return variance(costs) / len(costs) / mean(costs) ** 2 if len(costs) > 1 else 0.0
