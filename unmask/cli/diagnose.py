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
from unmask.lab.diagnostics.subject import Subject
from unmask.lab.diagnostics.tables import tables
from unmask.progress import progress, warn


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
    subjects = [Subject.open(run, warn, step=step, weights=chosen, device=device) for run in runs]
    decoders = [None if decoder is None else options.parse_decoder(decoder, own.config.decode) for own in subjects]
    found = []
    for subject, settings in zip(subjects, decoders, strict=True):
        with progress(f"Diagnosing {subject.run}", 100 * len(parts)) as update:
            found.append(
                diagnose_run(
                    subject,
                    parts,
                    examples=examples,
                    draws=draws,
                    decoder=settings,
                    per_bin=per_bin,
                    on_progress=partial(_show, update),
                )
            )
        if not is_json:
            _print(subject, found[-1])
    if is_json:
        options.print_json({"runs": [_json(*pair) for pair in zip(subjects, found, strict=True)]})


def _show(update: Callable[[int], None], done: float) -> None:
    update(round(100 * done))


def _check_parts(only: list[str] | None) -> list[str]:
    for part in only or ():
        if part not in PARTS:
            raise UserError(f"--only {part}: no such diagnostic; use {', '.join(PARTS)}")
    return only or list(PARTS)


def _json(subject: Subject, found: Diagnosis) -> dict[str, Any]:
    return {"run": str(subject.run), **to_json(found)}


def _print(subject: Subject, found: Diagnosis) -> None:
    out = options.results()
    out.print(f"{subject.run}, step {found.step}, {found.weights} weights")
    for words in tables(found):
        table = Table(title=words.title, title_justify="left")
        for number, column in enumerate(words.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in words.rows:
            table.add_row(*row)
        out.print(table)
    for part, reason in found.missing.items():
        out.print(f"No {part}: {reason}")
