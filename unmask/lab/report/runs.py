"""Reads the runs of a report, and groups them into methods: runs that differ in their seed alone."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from unmask.config.run import RunConfig
from unmask.config.settings import flatten
from unmask.errors import UserError
from unmask.lab.report.curves import Curve, MetricsRow, is_finite, read_metrics
from unmask.lab.report.measures import Measure
from unmask.training.folder import RunFolder, read_config, read_environment

_NOT_THE_METHOD = (
    *("train.seed", "train.threads", "train.compile", "train.device", "data.cache_dir", "log"),
    *("train.checkpoint_every", "train.keep_last", "train.keep_every"),
)
MOST_METHODS = 6
"""Largest number of methods that a page can distinguish by colour, dash and marker."""


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run folder: its settings, machine and metrics."""

    folder: Path
    config: RunConfig
    environment: dict[str, Any]
    rows: list[MetricsRow]
    is_running: bool

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Its settings by dotted key."""
        return dict(flatten(self.config.model_dump(mode="json")))

    @cached_property
    def effective(self) -> dict[str, Any]:
        """Its settings but for those whose section says that they need another value of another one."""
        idle = self.config.without_effect()
        return {key: value for key, value in self.settings.items() if key not in idle}

    @property
    def seed(self) -> int:
        return self.config.train.seed

    @property
    def last_step(self) -> int:
        return int(self.rows[-1]["step"])

    def measures(self) -> list[str]:
        """Lists the measures of its evaluations that were finite at least once, in the order in which they appear."""
        return list(self._evaluated)

    @cached_property
    def _evaluated(self) -> dict[str, list[MetricsRow]]:
        """The rows that have a measure, by measure: read once, as a page asks for every measure several times."""
        found: dict[str, list[MetricsRow]] = {}
        for row in self.rows:
            for key, value in row.items():
                is_measure = key.startswith("eval/") and not key.endswith("_stderr") and key != "eval/examples"
                if is_measure and is_finite(value):
                    found.setdefault(key, []).append(row)
        return found

    def curve(self, measure: str) -> Curve:
        """Returns its evaluations of `measure`.

        Raises:
            UserError: there are none.
        """
        curve = Curve.of(self._evaluated.get(measure, ()), measure)
        if not curve.values:
            said = ", ".join(self.measures()) or "nothing yet"
            raise UserError(f"{self.folder}: no evaluation has written {measure}; there is {said}")
        return curve

    def level(self, key: str) -> float | None:
        """Returns the last value that its evaluations have at `key`, where a measure has the value to hold it against.

        None if there is none.
        """
        rows = self._evaluated.get(key)
        return None if not rows else float(rows[-1][key])


RunsByMethod = dict[str, list[RunRecord]]
"""Runs that differ in their seed alone, by the name of the method; the first is the baseline."""


def read_run(folder: Path, warn: Callable[[str], None]) -> RunRecord:
    """Reads a run folder, and calls `warn` if something is damaged, or still training.

    Raises:
        UserError: it is no run folder, or has no metrics yet.
    """
    config = read_config(folder)
    is_running = RunFolder(folder).is_held()
    rows = read_metrics(folder, warn, is_running=is_running)
    if not rows:
        raise UserError(f"{folder}: its metrics.jsonl holds nothing yet; let it train to its first evaluation")
    if is_running:
        warn(f"{folder}: still training; the report shows it up to step {rows[-1]['step']}")
    return RunRecord(folder, config, read_environment(folder), _with_passes(rows, config), is_running)


def _with_passes(rows: list[MetricsRow], config: RunConfig) -> list[MetricsRow]:
    """Adds `passes` to rows from before they were counted: the steps, if each was one pass; else they are unknown."""
    takes_more = getattr(config.model, "self_conditioning", False) or getattr(config.process, "block_size", None)
    return rows if takes_more else [{"passes": row["step"]} | row for row in rows]


def group(runs: Sequence[RunRecord]) -> RunsByMethod:
    """Groups runs into methods. Runs that differ in the seed alone are one method, named after its folder.

    Raises:
        UserError: a run is given twice, there are too many methods, or the runs are of different tasks.
    """
    _check_comparable(runs)
    by_settings: dict[str, list[RunRecord]] = {}
    for run in runs:
        settings = {key: value for key, value in run.settings.items() if _is_of_the_method(key)}
        by_settings.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    groups = list(by_settings.values())
    for same in groups:
        if len({run.seed for run in same}) < len(same):
            folders = " and ".join(str(run.folder) for run in same)
            raise UserError(f"{folders}: the same settings and seed; give one of them")
    if len(groups) > MOST_METHODS:
        raise UserError(f"{len(groups)} methods are more than a page can tell apart; give {MOST_METHODS} at most")
    return dict(zip(_names(groups), groups, strict=True))


def _is_of_the_method(key: str) -> bool:
    return key not in _NOT_THE_METHOD and key.split(".")[0] not in _NOT_THE_METHOD


def _names(groups: Sequence[Sequence[RunRecord]]) -> list[str]:
    """Names methods by their first run's folder (METHOD for `METHOD/seed_0`), or by whole paths if names are equal."""
    folders = [runs[0].folder.resolve() for runs in groups]
    named = [folder.parent if re.fullmatch(r"seed_\d+", folder.name) else folder for folder in folders]
    short = [folder.name for folder in named]
    return short if len(set(short)) == len(short) else [str(runs[0].folder) for runs in groups]


def _check_comparable(runs: Iterable[RunRecord]) -> None:
    first, *others = runs
    for run in others:
        if run.config.task.name != first.config.task.name:
            raise UserError(
                f"{first.folder} is of the task {first.config.task.name}, {run.folder} of {run.config.task.name}: "
                "a report holds runs of one task beside each other; make two"
            )


def common_measures(methods: RunsByMethod) -> list[str]:
    """Lists the measures that all runs have: rates by decoder, then likelihoods, then the others that can be drawn.

    `eval/accuracy` is left out: it is the rate of each run's own first decoder, and decoders may differ.

    Raises:
        UserError: there is none.
    """
    runs = [run for same in methods.values() for run in same]
    of_others = [set(run.measures()) for run in runs[1:]]
    common = [key for key in runs[0].measures() if all(key in own for own in of_others)]
    likelihoods = ("eval/nelbo", "eval/bits_per_byte")
    shown = [key for key in common if key != "eval/accuracy" and Measure.of(key) is not None]
    shown.sort(key=lambda key: (not key.startswith("eval/accuracy/"), key not in likelihoods))  # a stable sort
    if not shown:
        said = "; ".join(f"{run.folder}: {', '.join(run.measures()) or 'no evaluation yet'}" for run in runs)
        raise UserError(f"these runs have no evaluation in common ({said}); evaluate them alike, with eval.*")
    return shown


def differing_settings(methods: RunsByMethod) -> dict[str, list[Any]]:
    """Returns the settings in which methods differ, each with every method's value.

    None stands for a key that the method does not have, or that has no effect there.
    """
    settings = [runs[0].effective for runs in methods.values()]
    keys = dict.fromkeys(key for own in settings for key in own if _is_of_the_method(key))
    values = {key: [own.get(key) for own in settings] for key in keys}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


def about_other_data(methods: RunsByMethod) -> str | None:
    """Says which methods were measured on other data than the first one, as far as runs keep what theirs are.

    Where tasks do not say it, settings of data that differ are named.
    """
    data = {name: runs[0].environment.get("data") for name, runs in methods.items()}
    first, *others = data
    if differ := [name for name in others if data[name] and data[first] and data[name] != data[first]]:
        return f"the data of {', '.join(differ)} are not those of {first}: their figures do not compare"
    keys = [key for key in differing_settings(methods) if key.startswith("data.")]
    if not keys or all(data.values()):
        return None
    return f"methods differ in {', '.join(keys)}: their figures compare only where their held-out examples are the same"
