"""`unmask report`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from unmask.cli import options
from unmask.errors import UserError
from unmask.lab.diagnostics.diagnose import CHEAP, PARTS
from unmask.lab.report import page
from unmask.lab.report.diagnoses import diagnose_methods
from unmask.lab.report.models import study
from unmask.lab.report.runs import RunsByMethod, common_measures, group, read_run
from unmask.progress import console, progress, warn
from unmask.training.folder import command_line


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN..", help="Run folders of one task.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Its headline; the methods' names unless given.")] = None,
    measure: Annotated[
        str | None,
        typer.Option(
            help="What to show first, as in metrics.jsonl: eval/accuracy/.., eval/nelbo or eval/bits_per_byte."
        ),
    ] = None,
    decoder: Annotated[
        str | None, typer.Option(help="Of the replay; the first run's `decode` section unless given. As in `eval`.")
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Held-out examples to replay.")] = 6,
    noise_scale: Annotated[
        bool, typer.Option("--noise-scale", help="Also measure the noise of gradients, which takes longest.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a page that is there.")] = False,
) -> None:
    """Hold runs beside each other on one HTML page, which needs nothing else: no network, no other file.

    Curves against steps, seconds and examples; held-out puzzles being solved, cell by cell; what each method trains on;
    what is hard, and why (`unmask diagnose`); the settings that differ; the commands. Runs that differ in their seed
    alone count as one method, named after its folder (METHOD of METHOD/seed_0); the first is the baseline.

    Examples:

    * `unmask report runs/sudoku-uniform runs/sudoku-puma --out puma.html`

    * `unmask report comparison/*/seed_*/`
    """
    if out.exists() and not (force or out.is_dir()):
        raise UserError(f"--out {out}: exists already; name another file, or write over it with --force")
    methods = group([read_run(run, warn) for run in runs])
    if measure is not None and measure not in common_measures(methods):
        raise UserError(f"--measure {measure}: not in all runs; they share {', '.join(common_measures(methods))}")
    write(
        methods,
        out,
        title=title,
        measure=measure,
        decoder=decoder,
        num_examples=examples,
        parts=PARTS if noise_scale else CHEAP,
        commands=[command_line()],
    )
    console.print(f"{out} is written: open it in a browser")


def write(
    methods: RunsByMethod,
    out: Path,
    *,
    title: str | None = None,
    measure: str | None = None,
    decoder: str | None = None,
    num_examples: int = 6,
    parts: Sequence[str] = CHEAP,
    commands: Sequence[str] = (),
) -> None:
    """Makes the page of `methods`, over one that is there."""
    common_measures(methods)  # before any decoding
    config = next(iter(methods.values()))[0].config.decode
    chosen = config if decoder is None else options.parse_decoder(decoder, config)
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file")
    options.make_folder(out.parent)
    with progress("Decoding for the replay", num_examples * len(methods)) as update:
        studied = study(methods, chosen, num_examples=num_examples, warn=warn, on_example=update)
    with progress("Diagnosing", 100 * len(parts) * len(methods)) as update:
        diagnoses = diagnose_methods(
            methods, chosen, parts, warn=warn, on_progress=lambda done: update(round(100 * done))
        )
    html = page.render(
        methods,
        studied,
        diagnoses,
        title=title or " and ".join(methods),
        first_measure=measure,
        commands=commands,
    )
    options.write(out, html)
