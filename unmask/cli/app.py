"""The command line: `unmask VERB`. Results go to stdout; messages and progress go to stderr."""

from importlib import metadata
from typing import Annotated

import typer

from unmask.cli import (
    bench,
    chat,
    compare,
    decode,
    diagnose,
    evaluate,
    export,
    grade,
    importing,
    prepare,
    report,
    settings,
    train,
)
from unmask.config import recipes


def _print_version(is_asked: bool | None) -> None:
    if is_asked:
        print(f"unmask {metadata.version('unmask')}")
        raise typer.Exit


app = typer.Typer(
    help="Train masked diffusion language models (MDMs) with PUMA and its baselines, and decode from them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)


@app.callback()
def _options(
    version: Annotated[
        bool | None,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit."),
    ] = None,
    traceback: Annotated[
        bool,
        typer.Option(
            "--traceback",
            help="Show where an error comes from; may stand anywhere in the command (or set UNMASK_TRACEBACK=1).",
        ),
    ] = False,
) -> None: ...


app.command("prepare")(prepare.prepare)
app.command("train", epilog=f"Shipped recipes: {', '.join(recipes.names())}")(train.train)
app.command("settings")(settings.settings)
app.command("eval")(evaluate.evaluate)
app.command("decode")(decode.decode)
app.command("chat")(chat.chat)
app.command("compare")(compare.compare)
app.command("diagnose")(diagnose.diagnose)
app.command("report")(report.report)
app.command("grade")(grade.grade)
app.command("import")(importing.import_)
app.command("export")(export.export)
app.add_typer(bench.app, name="bench")
