"""Runs the diagnostics of a run, by name, and shows them as tables of text."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import floor, isnan, log10
from typing import Any

from unmask.decoding.config import DecodeConfig
from unmask.evaluation.evaluate import Cells
from unmask.evaluation.nelbo import Estimate
from unmask.evaluation.statistics import share_text
from unmask.lab.diagnostics.likelihood import MaskedNll, measure_nll
from unmask.lab.diagnostics.measures import NOWHERE, Bin, NotApplicable
from unmask.lab.diagnostics.mismatch import Mismatch, measure_mismatch
from unmask.lab.diagnostics.mistakes import FirstMistakes, measure_mistakes
from unmask.lab.diagnostics.noise_scale import NoiseScale, measure_noise_scale
from unmask.lab.diagnostics.overfitting import Overfitting, measure_overfitting
from unmask.training.evaluating import warn_of_fewer
from unmask.training.loading import LoadedRun

PARTS = ("nll", "mismatch", "mistakes", "overfitting", "noise")
DEFAULT = ("nll", "mismatch", "overfitting", "noise")
"""Those that are measured where none is named, and drawn on the page. The others decode many examples."""
CHEAP = DEFAULT[:3]
MOST_DECODED = 16
"""Largest number of examples that the mismatch is measured on: each is decoded and trained on several times."""
NUM_DRAWS = 4
"""Masks of each example."""


@dataclass(frozen=True)
class Diagnosis:
    """The measurements of a run; `missing` holds the reason for each part that could not be measured."""

    step: int
    weights: str
    nll: MaskedNll | None = None
    mismatch: Mismatch | None = None
    mistakes: FirstMistakes | None = None
    overfitting: Overfitting | None = None
    noise: NoiseScale | None = None
    missing: dict[str, str] = field(default_factory=dict)


NUM_EXAMPLES = 64


def diagnose(
    run: LoadedRun,
    parts: Sequence[str] = DEFAULT,
    *,
    examples: int | None = None,
    draws: int = NUM_DRAWS,
    decoder: DecodeConfig | None = None,
    gradient_weights: str = "raw",
    per_bin: int = 48,
    on_progress: Callable[[float], None] = lambda done: None,
) -> Diagnosis:
    """Measures `parts`.

    Args:
        examples: number of held-out examples (for the mismatch, at most `MOST_DECODED`); warns if there are fewer.
            Default: up to `NUM_EXAMPLES`.
        draws: masks drawn for each example.
        decoder: the decoder whose masks and mistakes are measured (default: the run's own).
        gradient_weights: where gradients are taken: `raw`, as in a training step, or `ema`.
        per_bin: gradients in each bin of the noise scale.
        on_progress: called with the number of parts that are done, fractions included.

    Raises:
        UserError: the model does not support this decoder, or its data are gone.
    """
    chosen, model = decoder or run.config.decode, run.trainer().model
    if not model.is_causal:
        run.decoder(chosen, model)  # refuses before any work
    held_out = run.held_out(examples or NUM_EXAMPLES)
    if examples is not None:
        warn_of_fewer(held_out, examples, "examples=")
    measure: dict[str, Callable[..., Any]] = {
        "nll": partial(measure_nll, run, held_out, draws=draws),
        "mismatch": partial(measure_mismatch, run, held_out[:MOST_DECODED], chosen),
        "mistakes": partial(measure_mistakes, run, held_out, chosen),
        "overfitting": partial(measure_overfitting, run, held_out, draws=draws),
        "noise": partial(measure_noise_scale, run, weights=gradient_weights, per_bin=per_bin),
    }
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for done, part in enumerate(part for part in PARTS if part in parts):
        try:
            found[part] = measure[part](on_progress=lambda share, done=done: on_progress(done + share))
        except NotApplicable as reason:
            missing[part] = str(reason)
        on_progress(done + 1.0)
    return Diagnosis(run.step, run.weights, **found, missing=missing)


def as_json(found: Diagnosis) -> dict[str, Any]:
    """Converts a diagnosis to values for JSON, with None for the edges of bins that are open."""
    return asdict(found, dict_factory=_with_open_edges)


def _with_open_edges(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: None if name in ("low", "high") and value >= NOWHERE - 1 else value for name, value in pairs}


def tables(found: Diagnosis) -> list[Cells]:
    """Returns the tables of the parts that were measured."""
    return [
        *(_nll_tables(found.nll) if found.nll else ()),
        *([_mismatch_table(found.mismatch)] if found.mismatch else ()),
        *([_mistakes_table(found.mistakes)] if found.mistakes else ()),
        *([_overfitting_table(found.overfitting)] if found.overfitting else ()),
        *([_noise_table(found.noise)] if found.noise else ()),
    ]


def _nll_tables(nll: MaskedNll) -> list[Cells]:
    rates = [
        [_shares(own.low, own.high), _plus_minus(own.value, own.stderr), f"{own.share:.1%}", str(own.tokens)]
        for own in nll.rate
    ]
    columns = ("nats per masked token", "share of the NELBO's weight", "tokens")
    return [
        Cells(("masked", *columns), rates, "NLL by masked share"),
        *(
            Cells(("positions", *columns), _distances(bins), title)
            for title, bins in (
                ("NLL by distance to the nearest visible token", nll.distance),
                ("The same, where 40% to 60% are masked", nll.distance_middle),
                ("NLL by distance to the nearest visible token on the left", nll.left),
            )
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


def _mismatch_table(found: Mismatch) -> Cells:
    rows = [
        ["all, as they come", *(_estimate(side.whole) for side in (found.trained, found.uniform))],
        ["with as much masked", *(_estimate(side.matched) for side in (found.trained, found.uniform))],
    ]
    uniform = dict(found.uniform.by_share)
    rows += [
        [f"around {share:.0%} masked", _estimate(own), _estimate(uniform[share]) if share in uniform else "unknown"]
        for share, own in found.trained.by_share
    ]
    sides = (found.trained, found.uniform)
    rows.append(["positions that differ", *(_mean_share(side.differing, found.examples) for side in sides)])
    title = f"MMD² to the masks that {found.decoder} meets, {found.examples} examples (0: the same masks)"
    return Cells(("masks", "of this run's training", "uniform"), rows, title)


def _mistakes_table(found: FirstMistakes) -> Cells:
    rows = [
        [_shares(own.low, own.high), str(own.steps), share_text(own.mistakes, own.steps), str(own.mistakes)]
        for own in reversed(found.bins)
    ]
    title = f"First wrong token of {found.decoder}: {found.wrong} of {found.examples} examples have one"
    return Cells(("masked before the step", "steps", "of them wrong", "first mistakes"), rows, title)


def _overfitting_table(found: Overfitting) -> Cells:
    seen = (
        f"{found.examples_seen:,} examples drawn, of {found.distinct:,} entries of the data ({found.passes:.2g} passes)"
    )
    title = f"{seen}; {found.steps_per_example:.2f} steps each time, {found.visits:.2f} visits of each in all"
    trained = {"trained on last": found.recent, "trained on first": found.early}
    rows = [["held out", _estimate(found.held_out), ""]]
    rows += [[name, _estimate(own), _estimate(found.gap(own))] for name, own in trained.items() if own is not None]
    return Cells(("examples", "nats per maskable token", "held out minus these"), rows, title)


def overfitting_row(found: Overfitting) -> tuple[str, ...]:
    """Returns examples drawn, entries of the data, visits, NELBO held out and trained on last, and the gap, as text."""
    counts = f"{found.examples_seen:,}", f"{found.distinct:,}", f"{found.visits:.2f}"
    recent = ("unknown",) * 2 if found.recent is None else (_estimate(found.recent), _estimate(found.gap(found.recent)))
    return *counts, _estimate(found.held_out), *recent


def _noise_table(found: NoiseScale) -> Cells:
    rows = [
        [
            _shares(own.low, own.high) if own.high else "nothing masked",
            _estimate(own.signal),
            _estimate(own.variance),
            _estimate(own.scale) if own.is_measured else ("unknown" if isnan(own.least) else f"above {own.least:.3g}"),
            str(own.canvases),
        ]
        for own in found.bins
    ]
    title = f"Gradient noise of one row's loss, {found.weights} weights"
    return Cells(("masked", "|G|²", "tr(Σ)", "noise scale tr(Σ)/|G|²", "gradients"), rows, title)


def _shares(low: float, high: float) -> str:
    return f"{low:.0%} to {high:.0%}"


def _estimate(found: Estimate) -> str:
    return _plus_minus(found.value, found.stderr)


def _plus_minus(value: float, stderr: float | None) -> str:
    """Formats a value as far as the two digits of its error reach; very small and very large ones to three digits."""
    if isnan(value) or stderr is None or isnan(stderr):
        return "unknown" if isnan(value) else f"{value:.3g}"
    if not (1e-5 <= stderr < 1e6 and abs(value) < 1e6):
        return f"{value:.3g} ± {stderr:.2g}"
    decimals = max(0, 1 - floor(log10(float(f"{stderr:.1e}"))))  # once it is rounded: 0.0996 is 0.10
    return f"{value:.{decimals}f} ± {stderr:.{decimals}f}"


def _mean_share(found: Estimate, examples: int) -> str:
    """Formats the mean of a share of each example with its standard error; where that is 0 as all are alike, at 0 and
    100 %, with Wilson's interval, which has a width there."""
    if isnan(found.value):
        return "unknown"
    if found.stderr is None or isnan(found.stderr) or f"{found.value:.1%}" in ("0.0%", "100.0%"):
        return share_text(found.value * examples, examples)
    return f"{found.value:.1%} ± {found.stderr:.1%}"
