"""`unmask diagnose`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from unmask.cli import options
from unmask.errors import UserError
from unmask.lab.diagnostics.diagnose import PARTS, Diagnosis, to_json
from unmask.lab.diagnostics.diagnose import diagnose as diagnose_run
from unmask.lab.diagnostics.tables import tables
from unmask.progress import progress
from unmask.training.loading import LoadedRun


def diagnose(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN..", help="Run folders.", show_default=False)],
    only: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(PARTS)}; all unless given. May be repeated.")
    ] = None,
    examples: Annotated[int, typer.Option(min=2, help="Held-out examples.")] = 64,
    draws: Annotated[int, typer.Option(min=1, help="Masks of each.")] = 4,
    per_bin: Annotated[int, typer.Option(min=2, help="Gradients in each bin of the noise scale.")] = 48,
    decoder: Annotated[
        str | None, typer.Option(help="Whose masks are compared with training's; the run's unless given. As in `eval`.")
    ] = None,
    weights: options.Weights = None,
    step: options.Step = "last",
    device: options.Device = None,
    is_json: options.AsJson = False,
) -> None:
    """Explain a training, from its checkpoint: which masked tokens are hard, how noisy their gradients are, whether it
    trains on the masks that decoding meets, and whether it knows by heart what it has seen.

    Gradients are those of the raw weights, unless --weights is given.

    Examples:

    * `unmask diagnose runs/text-uniform_small`

    * `unmask diagnose runs/sudoku-uniform runs/sudoku-puma --only mismatch --json`
    """
    parts = _check_parts(only)
    chosen = options.check_weights(weights)
    opened = [LoadedRun.open(run, weights=chosen, step=step, device=device) for run in runs]
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
                    gradient_weights=chosen or "raw",
                    per_bin=per_bin,
                    on_progress=partial(_show, update),
                )
            )
        if not is_json:
            _print(run, found[-1])
    if is_json:
        options.print_json({"runs": [_json(*pair) for pair in zip(opened, found, strict=True)]})


def _show(update: Callable[[int], None], done: float) -> None:
    update(round(100 * done))


def _check_parts(only: list[str] | None) -> list[str]:
    for part in only or ():
        if part not in PARTS:
            raise UserError(f"--only {part}: no such diagnostic; use {', '.join(PARTS)}")
    return only or list(PARTS)


def _json(run: LoadedRun, found: Diagnosis) -> dict[str, Any]:
    return {"run": str(run.path), **to_json(found)}


def _print(run: LoadedRun, found: Diagnosis) -> None:
    out = options.results()
    out.print(f"{run.path}, step {found.step}, {found.weights} weights")
    for words in tables(found):
        table = Table(title=words.title, title_justify="left")
        for number, column in enumerate(words.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in words.rows:
            table.add_row(*row)
        out.print(table)
    for part, reason in found.missing.items():
        out.print(f"No {part}: {reason}")
