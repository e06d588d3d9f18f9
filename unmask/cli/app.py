"""The command line: `unmask VERB`. Results go to stdout; messages and progress go to stderr."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

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
    lm_eval,
    prepare,
    report,
    settings,
    train,
)
from unmask.config import recipes
from unmask.formats import printable


def _print_version(is_asked: bool | None) -> None:
    if is_asked:
        print(f"unmask {metadata.version('unmask')}")
        raise typer.Exit


class _Verbs(TyperGroup):
    """The verbs. What a usage error quotes of the command line has its control and direction characters escaped."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _printable_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with _printable_errors():
            return super().invoke(ctx)


@contextmanager
def _printable_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message"):  # one of click's, which typer prints in a box
            error.format_message = partial(printable, error.format_message())
        raise


app = typer.Typer(
    cls=_Verbs,
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
app.command("lm-eval", context_settings=lm_eval.SETTINGS)(lm_eval.lm_eval)
app.command("import")(importing.import_)
app.command("export")(export.export)
app.add_typer(bench.app, name="bench")
