"""The verb `unmask report`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from unmask import paths
from unmask.cli import options
from unmask.errors import UserError
from unmask.lab.diagnostics.diagnose import CHEAP, DEFAULT
from unmask.lab.report import page
from unmask.lab.report.runs import RunsByMethod, common_measures, group, read_run
from unmask.progress import console, warn
from unmask.training.folder import command_line


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN..", help="Run folders of one task.", show_default=False)],
    out: Annotated[str, typer.Option(metavar="FILE", help="The page to write.")] = "report.html",
    title: Annotated[str | None, typer.Option(help="Headline of the page (default: the methods' names).")] = None,
    measure: Annotated[
        str | None,
        typer.Option(
            help="Measure to show first, as in metrics.jsonl, such as eval/accuracy/.., eval/nelbo or eval/gen_ppl "
            "(default: the first rate)."
        ),
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(help="Decoder of the replay, as in `unmask eval` (default: the first run's `decode` section)."),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, max=10_000, help="Held-out examples to replay.")] = 6,
    noise_scale: Annotated[
        bool, typer.Option("--noise-scale", help="Also measure the noise of gradients, which takes longest.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing page.")] = False,
    data_changed: options.DataChanged = False,
    trust_code: options.TrustCode = False,
    follow_links: options.FollowLinks = False,
) -> None:
    """Compare runs on one self-contained HTML page, which needs no network and no other file.

    The page shows: curves against steps, seconds, passes and examples; held-out puzzles being solved, cell by cell; the
    masks that each method trains on; what is hard, and why (see `unmask diagnose`); the settings that differ; the
    protocol of each method's own evaluations, as a file for `unmask eval --protocol`; the commands.

    Runs that differ only in their seed count as one method, named after its folder (METHOD for METHOD/seed_0). The
    first method is the baseline.

    Examples:

    * `unmask report runs/sudoku-uniform runs/sudoku-puma --out puma.html`

    * `unmask report comparison/*/seed_*/`
    """
    target = paths.user_path(out, options.OUT)
    if target.exists() and not (force or target.is_dir()):
        raise UserError(f"--out {out}: exists already; name another file, or write over it with --force")
    methods = group([read_run(paths.user_path(run), warn) for run in runs])
    if measure is not None and measure not in common_measures(methods):
        raise UserError(f"--measure {measure}: not in all runs; they share {', '.join(common_measures(methods))}")
    write(
        methods,
        target,
        title=title,
        measure=measure,
        decoder=decoder,
        num_examples=examples,
        parts=DEFAULT if noise_scale else CHEAP,
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
    """Builds the page of `methods`, and writes it to `out`, over a page that is there.

    Raises:
        UserError: the runs have no evaluation in common, the decoder is wrong, or `out` cannot be written.
    """
    common_measures(methods)  # refuses before any decoding
    config = next(iter(methods.values()))[0].config.decode
    chosen = config if decoder is None else options.parse_decoder(decoder, config)
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file")
    options.make_out_folder(out.parent)
    html = page.build(
        methods,
        chosen,
        title=title or " and ".join(methods),
        first_measure=measure,
        num_examples=num_examples,
        parts=parts,
        commands=commands,
    )
    options.write(out, html)
