"""Shows diagnostics as tables of text."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan

from unmask.evaluation.nelbo import Estimate
from unmask.lab.diagnostics.diagnose import Diagnosis
from unmask.lab.diagnostics.likelihood import MaskedNll
from unmask.lab.diagnostics.measures import NOWHERE, Bin
from unmask.lab.diagnostics.mismatch import Mismatch
from unmask.lab.diagnostics.noise_scale import NoiseScale
from unmask.lab.diagnostics.overfitting import Overfitting


@dataclass(frozen=True)
class TextTable:
    """A table of text, whose first column names the rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(found: Diagnosis) -> list[TextTable]:
    """Returns the tables of the parts that were measured."""
    return [
        *(_nll_tables(found.nll) if found.nll else ()),
        *([_mismatch_table(found.mismatch)] if found.mismatch else ()),
        *([_overfitting_table(found.overfitting)] if found.overfitting else ()),
        *([_noise_table(found.noise)] if found.noise else ()),
    ]


def _nll_tables(nll: MaskedNll) -> list[TextTable]:
    rates = [
        [_shares(own.low, own.high), _plus_minus(own.value, own.stderr), f"{own.share:.1%}", str(own.tokens)]
        for own in nll.rate
    ]
    columns = ("nats per masked token", "share of the NELBO's weight", "tokens")
    return [
        TextTable("NLL by masked share", ("masked", *columns), rates),
        TextTable("NLL by distance to the nearest visible token", ("positions", *columns), _distances(nll.distance)),
        TextTable("The same, where 40% to 60% are masked", ("positions", *columns), _distances(nll.distance_middle)),
        TextTable(
            "NLL by distance to the nearest visible token on the left", ("positions", *columns), _distances(nll.left)
        ),
    ]


def _distances(bins: Sequence[Bin]) -> list[list[str]]:
    return [
        [format_distances(own), _plus_minus(own.value, own.stderr), f"{own.share:.1%}", str(own.tokens)] for own in bins
    ]


def format_distances(own: Bin) -> str:
    """Formats the distances of a bin."""
    low, high = int(own.low) + 1, int(own.high)
    if high == NOWHERE:
        return "nothing visible"
    if high == NOWHERE - 1:
        return f"{low} and more"
    return str(high) if low == high else f"{low} to {high}"


def _mismatch_table(found: Mismatch) -> TextTable:
    rows = [
        ["all, as they come", *(_estimate(side.whole) for side in (found.trained, found.uniform))],
        ["with as much masked", *(_estimate(side.matched) for side in (found.trained, found.uniform))],
    ]
    uniform = dict(found.uniform.by_share)
    rows += [
        [f"around {share:.0%} masked", _estimate(own), _estimate(uniform[share]) if share in uniform else "unknown"]
        for share, own in found.trained.by_share
    ]
    differing = (f"{side.differing.value:.1%} ± {side.differing.stderr:.1%}" for side in (found.trained, found.uniform))
    rows.append(["positions that differ", *differing])
    title = f"MMD² to the masks that {found.decoder} meets, {found.examples} examples (0: the same masks)"
    return TextTable(title, ("masks", "of this run's training", "uniform"), rows)


def _overfitting_table(found: Overfitting) -> TextTable:
    seen = f"{found.examples_seen:,} examples drawn, {found.distinct:,} distinct ({found.passes:.2g} passes)"
    title = f"{seen}; {found.steps_per_example:.2f} steps each time, {found.visits:.2f} visits of each in all"
    trained = {"trained on last": found.recent, "trained on first": found.early}
    rows = [["held out", _estimate(found.held_out), ""]]
    rows += [[name, _estimate(own), _estimate(found.gap(own))] for name, own in trained.items() if own is not None]
    return TextTable(title, ("examples", "nats per maskable token", "held out minus these"), rows)


def overfitting_row(found: Overfitting) -> tuple[str, ...]:
    """Returns examples drawn, distinct ones, visits, NELBO held out, NELBO trained on last, and the gap, as text."""
    counts = f"{found.examples_seen:,}", f"{found.distinct:,}", f"{found.visits:.2f}"
    recent = ("unknown",) * 2 if found.recent is None else (_estimate(found.recent), _estimate(found.gap(found.recent)))
    return *counts, _estimate(found.held_out), *recent


def _noise_table(found: NoiseScale) -> TextTable:
    rows = [
        [
            _shares(own.low, own.high) if own.high else "nothing masked",
            _estimate(own.signal),
            _estimate(own.variance),
            _estimate(own.scale) if own.is_measured else f"above {own.least:.3g}",
            str(own.canvases),
        ]
        for own in found.bins
    ]
    title = f"Gradient noise of one row's loss, {found.weights} weights"
    return TextTable(title, ("masked", "|G|²", "tr(Σ)", "noise scale tr(Σ)/|G|²", "gradients"), rows)


def _shares(low: float, high: float) -> str:
    return f"{low:.0%} to {high:.0%}"


def _estimate(found: Estimate) -> str:
    return _plus_minus(found.value, found.stderr)


def _plus_minus(value: float, stderr: float) -> str:
    if isnan(value):
        return "unknown"
    return f"{value:.3g} ± {'?' if isnan(stderr) else f'{stderr:.2g}'}"
