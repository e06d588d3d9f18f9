"""Diagnoses each method's first run, and draws the results for the page."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import isnan, nan

from unmask.decoding.config import DecodeConfig
from unmask.evaluation.evaluate import Cells
from unmask.evaluation.nelbo import Estimate
from unmask.lab.diagnostics.diagnose import Diagnosis, diagnose, overfitting_row
from unmask.lab.diagnostics.measures import NOWHERE, Bin
from unmask.lab.report.chart import Chart, Line
from unmask.lab.report.models import spared
from unmask.lab.report.runs import RunsByMethod
from unmask.training.loading import LoadedRun

LEAST_TOKENS = 50
"""Smallest number of tokens in a bin that is drawn: fewer say nothing, and would stretch the axis."""


@dataclass
class Diagnoses:
    """The diagnosis of each method, and in `missing` the reasons for those that could not be made."""

    found: dict[str, Diagnosis] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def diagnose_methods(
    methods: RunsByMethod,
    decoder: DecodeConfig,
    parts: Sequence[str],
    *,
    warn: Callable[[str], None],
    on_progress: Callable[[float], None],
) -> Diagnoses:
    """Diagnoses each method's first run.

    A run without a checkpoint, or whose data are gone, is left out with a call of `warn`; the others go on.
    `on_progress` is called with the number of parts done, of `len(methods) x len(parts)`.
    """
    result = Diagnoses()
    for number, (name, runs) in enumerate(methods.items()):

        def on_part(done: float, before: int = number) -> None:
            on_progress(before * len(parts) + done)

        with spared(result.missing, f"The diagnostics of {name}", warn):
            run = LoadedRun.open(runs[0].folder, warn=lambda line: None, is_published=True)
            result.found[name] = diagnose(run, parts, decoder=decoder, on_progress=on_part)
    reasons = {name: own.missing for name, own in result.found.items()}
    result.missing += [f"{name}, {part}: {reason}" for name, own in reasons.items() for part, reason in own.items()]
    return result


def charts(methods: RunsByMethod, diagnoses: Diagnoses) -> list[Chart]:
    """Draws the charts for which there are any data."""
    masked, nats = "masked share of maskable positions", "nats per masked token"
    away = "positions to the nearest visible token"
    drawn = [
        Chart("NLL by how much is masked", masked, nats, _lines(methods, diagnoses, _by_rate), is_x_share=True),
        Chart(
            "NLL by distance to the nearest visible token; open: with 40 % to 60 % masked",
            away,
            nats,
            _lines(methods, diagnoses, _by_distance),
            is_x_log2=True,
        ),
        Chart(
            "Distance of masks to those of decoding; open: of uniform masks",
            masked,
            "MMD²",
            _lines(methods, diagnoses, _by_mismatch),
            is_x_share=True,
        ),
        Chart(
            "Gradient noise scale; open: a lower bound, where noise hides the mean gradient",
            masked,
            "rows",
            _lines(methods, diagnoses, _by_noise),
            is_x_share=True,
        ),
    ]
    return [chart for chart in drawn if chart.lines]


def overfitting(diagnoses: Diagnoses) -> Cells | None:
    """Makes the table of overfitting, one row for each method; None if no method was measured."""
    rows = [(name, *overfitting_row(own.overfitting)) for name, own in diagnoses.found.items() if own.overfitting]
    columns = ("method", "examples drawn", "entries of the data", "steps on each in all")
    return (
        Cells((*columns, "NELBO held out", "trained on last", "held out minus that"), rows, "Known by heart?")
        if rows
        else None
    )


_LabelledPoints = tuple[str, Sequence[tuple[float, float, float]], bool]
"""What is added to the method's name, (x, y, standard error), and True for a reference line."""


def _lines(
    methods: RunsByMethod, diagnoses: Diagnoses, curves: Callable[[Diagnosis], Iterator[_LabelledPoints]]
) -> list[Line]:
    lines = []
    for number, name in enumerate(methods):
        for what, points, is_reference in curves(diagnoses.found[name]) if name in diagnoses.found else ():
            known = [(x, y, 0.0 if isnan(error) else error) for x, y, error in points if not isnan(y)]
            if known:
                place, errors = [(x, y) for x, y, _ in known], [error for *_, error in known]
                lines.append(Line(f"{name}{what}", number, place, is_reference=is_reference, errors=errors))
    return lines


def _by_rate(found: Diagnosis) -> Iterator[_LabelledPoints]:
    if found.nll:
        yield "", _binned(found.nll.rate), False


def _by_distance(found: Diagnosis) -> Iterator[_LabelledPoints]:
    if found.nll:
        yield "", _binned(found.nll.distance), False
        yield ", 40 % to 60 % masked", _binned(found.nll.distance_middle), True


def _binned(bins: Sequence[Bin]) -> list[tuple[float, float, float]]:
    return [(own.at, own.value, own.stderr) for own in bins if own.tokens >= LEAST_TOKENS and own.high < NOWHERE]


def _by_mismatch(found: Diagnosis) -> Iterator[_LabelledPoints]:
    if found.mismatch:
        yield ", training", _at_shares(found.mismatch.trained.by_share), False
        yield ", uniform masks", _at_shares(found.mismatch.uniform.by_share), True


def _by_noise(found: Diagnosis) -> Iterator[_LabelledPoints]:
    if found.noise:
        middle = [((own.low + own.high) / 2, own) for own in found.noise.bins]
        yield "", _at_shares([(share, own.scale) for share, own in middle if own.is_measured]), False
        yield ", at least", [(share, own.least, nan) for share, own in middle if not own.is_measured], True


def _at_shares(estimates: Sequence[tuple[float, Estimate]]) -> list[tuple[float, float, float]]:
    return [(share, own.value, nan if own.stderr is None else own.stderr) for share, own in estimates]
