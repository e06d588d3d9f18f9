"""Runs the diagnostics of a run, by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from math import isfinite
from typing import Any

from unmask.decoding.config import DecodeConfig
from unmask.lab.diagnostics.likelihood import MaskedNll, measure_nll
from unmask.lab.diagnostics.measures import NOWHERE, NotApplicable
from unmask.lab.diagnostics.mismatch import Mismatch, measure_mismatch
from unmask.lab.diagnostics.noise_scale import NoiseScale, measure_noise_scale
from unmask.lab.diagnostics.overfitting import Overfitting, measure_overfitting
from unmask.training.loading import LoadedRun

PARTS = ("nll", "mismatch", "overfitting", "noise")
CHEAP = PARTS[:3]
MOST_DECODED = 16
"""Largest number of examples that the mismatch is measured on: each is decoded and trained on several times."""


@dataclass(frozen=True)
class Diagnosis:
    """The measurements of a run; `missing` holds the reason for each part that could not be measured."""

    step: int
    weights: str
    nll: MaskedNll | None = None
    mismatch: Mismatch | None = None
    overfitting: Overfitting | None = None
    noise: NoiseScale | None = None
    missing: dict[str, str] = field(default_factory=dict)


def diagnose(
    run: LoadedRun,
    parts: Sequence[str] = PARTS,
    *,
    examples: int = 64,
    draws: int = 4,
    decoder: DecodeConfig | None = None,
    gradient_weights: str = "raw",
    per_bin: int = 48,
    on_progress: Callable[[float], None] = lambda done: None,
) -> Diagnosis:
    """Measures `parts`.

    Args:
        examples: number of held-out examples (for the mismatch, at most `MOST_DECODED`).
        draws: masks drawn for each example.
        decoder: the decoder whose masks are compared with those of training (default: the run's own).
        gradient_weights: where gradients are taken: `raw`, as in a training step, or `ema`.
        per_bin: gradients in each bin of the noise scale.
        on_progress: called with the number of parts that are done, fractions included.

    Raises:
        UserError: the model does not support this decoder, or its data are gone.
    """
    chosen, model = decoder or run.config.decode, run.trainer().model
    if not model.is_causal:
        run.decoder(chosen, model)  # refuses before any work
    held_out = run.task.validation(examples)
    measure: dict[str, Callable[..., Any]] = {
        "nll": partial(measure_nll, run, held_out, draws=draws),
        "mismatch": partial(measure_mismatch, run, held_out[:MOST_DECODED], chosen),
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


def to_json(value: Any) -> Any:
    """Converts dataclasses to JSON values, with None for numbers that are not finite and for distances to nothing."""
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: to_json(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, dict):
        return {key: to_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(each) for each in value]
    is_unknown = isinstance(value, float) and (not isfinite(value) or value >= NOWHERE - 1)
    return None if is_unknown else value
