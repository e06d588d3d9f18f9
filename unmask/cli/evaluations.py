"""Opens runs, and prints a result with its protocol, for all kinds of `unmask eval`."""

from collections.abc import Sequence
from typing import Any

from unmask import formats
from unmask.cli import options
from unmask.evaluation.evaluate import Cells
from unmask.training.loading import LoadedRun
from unmask.training.protocol import EvalOptions, Repeated


def open_run(asked: EvalOptions, run: str | None = None) -> LoadedRun:
    """Opens the run that is evaluated, or another one as it is."""
    return LoadedRun.open(run or asked.run, weights=asked.weights, step=asked.step, device=asked.device)


def print_evaluation(result: dict[str, Any], protocol: dict[str, Any], repeated: Repeated | None) -> None:
    """Prints an evaluation as JSON, with its protocol, and with what differs from the one that is `repeated`."""
    found = {}
    if repeated is not None:
        found["repeats"] = {
            "file": str(repeated.file),
            "differs": repeated.differences(protocol),
            "figures": repeated.figures(result),
        }
    options.print_json(result | found | {"protocol": protocol})


def print_repeated(result: dict[str, Any], protocol: dict[str, Any], repeated: Repeated | None) -> None:
    """Prints what differs from the evaluation that is `repeated`, and the figures of both."""
    if repeated is None:
        return
    out = options.results()
    differs, figures = repeated.differences(protocol), repeated.figures(result)
    out.print(f"Repeats {repeated.file}" + (", but for:" if differs else ", with nothing changed."))
    for key, (then, now) in differs.items():
        out.print(f"  {key}: {formats.printable(str(then))} then, {formats.printable(str(now))} now")
    if figures:
        rows: list[Sequence[str]] = [(key, *map(_shown, both)) for key, both in figures.items()]
        out.print(options.table(Cells(("figure", "then", "now"), rows)))


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
