"""The verb `unmask diagnose`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from unmask.cli import options
from unmask.errors import UserError
from unmask.lab.diagnostics.diagnose import DEFAULT, NUM_DRAWS, NUM_EXAMPLES, PARTS, Diagnosis, as_json, tables
from unmask.lab.diagnostics.diagnose import diagnose as diagnose_run
from unmask.progress import progress
from unmask.training.loading import LoadedRun


def diagnose(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN..", help="Run folders.", show_default=False)],
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Diagnostic to run: {', '.join(PARTS)} (default: all but mistakes). May be repeated."),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(
            min=2, max=10_000_000, help=f"Held-out examples to measure on (default: {NUM_EXAMPLES}, or all there are)."
        ),
    ] = None,
    draws: Annotated[int, typer.Option(min=1, max=100_000, help="Masks drawn for each example.")] = NUM_DRAWS,
    per_bin: Annotated[int, typer.Option(min=2, max=100_000, help="Gradients in each bin of the noise scale.")] = 48,
    decoder: Annotated[
        str | None,
        typer.Option(help="Decoder whose masks and mistakes are measured, as in `unmask eval` (default: the run's)."),
    ] = None,
    weights: options.Weights = None,
    step: options.Step = "last",
    device: options.Device = None,
    is_json: options.AsJson = False,
    data_changed: options.DataChanged = False,
    trust_code: options.TrustCode = False,
    follow_links: options.FollowLinks = False,
) -> None:
    """Explain a training, from its checkpoint:

    * `nll`: which masked tokens are hard, by the masked share and by the distance to visible tokens

    * `mismatch`: whether the run trains on the masks that decoding meets

    * `mistakes`: how much is still masked when decoding reveals its first wrong token (only if asked for)

    * `overfitting`: whether it predicts the examples that it has trained on better than held-out ones

    * `noise`: how noisy gradients are, by the masked share (raw weights, if --weights is not given)

    Examples:

    * `unmask diagnose runs/text-uniform_small`

    * `unmask diagnose runs/sudoku-uniform runs/sudoku-puma --only mismatch --json`
    """
    parts = _check_parts(only)
    opened = [LoadedRun.open(run, weights=weights, step=step, device=device) for run in runs]
    for run in opened:
        run.trainer()  # refuses exports before any work
    decoders = [options.parse_decoder(decoder, run.config.decode) for run in opened]
    found = []
    for run, settings in zip(opened, decoders, strict=True):
        with progress(f"Diagnosing {run.path}", 100 * len(parts)) as update:
            found.append(
                diagnose_run(
                    run,
                    parts,
                    examples=examples,
                    draws=draws,
                    decoder=settings,
                    gradient_weights=weights or "raw",
                    per_bin=per_bin,
                    on_progress=partial(_update_percent, update),
                )
            )
        if not is_json:
            _print(run, found[-1])
    if is_json:
        results = [{"run": str(run.path)} | as_json(own) for run, own in zip(opened, found, strict=True)]
        options.print_json({"runs": results})


def _update_percent(update: Callable[[int], None], done: float) -> None:
    update(round(100 * done))


def _check_parts(only: list[str] | None) -> list[str]:
    for part in only or ():
        if part not in PARTS:
            raise UserError(f"--only {part}: no such diagnostic; use {', '.join(PARTS)}")
    return only or list(DEFAULT)


def _print(run: LoadedRun, found: Diagnosis) -> None:
    missing = (f"Not measured, {part}: {reason}" for part, reason in found.missing.items())
    options.print_lines([f"{run.path}, step {found.step}, {found.weights} weights", *tables(found), *missing])
