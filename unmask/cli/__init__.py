"""The command line: `unmask VERB`. Results go to stdout; messages and progress go to stderr.

Exit codes: 0 done, 1 failed, 2 the user's input is wrong, 130 interrupted (a training run has saved by then).
"""

import sys
from collections.abc import Sequence
from contextvars import copy_context
from importlib import metadata
from typing import Annotated

import typer

from unmask import machine
from unmask.cli import bench, chat, compare, decode, diagnose, evaluate, export, grade, prepare, report, settings, train
from unmask.config import recipes
from unmask.errors import RunFailed, UserError
from unmask.lab.trainings import TrainingFailed
from unmask.progress import console
from unmask.training.distributed import PeerLost
from unmask.training.run import Interrupted


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
app.command("export")(export.export)
app.add_typer(bench.app, name="bench")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    machine.use_threads()
    try:
        # A context of its own, so that what one call trusts is not trusted by the next.
        copy_context().run(app, arguments, prog_name="unmask")
    except SystemExit as stop:  # typer always ends so, also after a message about a wrong option
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except UserError as error:
        console.print(f"Error: {error}", style="red")
        return 2
    except (RunFailed, TrainingFailed, PeerLost) as error:
        console.print(f"Error: {error}", style="red")
        return 1
    except Interrupted as stop:
        console.print(str(stop))
        return 130
    return 0


def run() -> None:
    """Runs the console script `unmask`."""
    sys.exit(main())
