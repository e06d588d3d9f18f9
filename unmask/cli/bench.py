"""The verb `unmask bench`."""

from typing import Annotated

import typer

from unmask.cli import options
from unmask.config import recipes
from unmask.lab import bench

app = typer.Typer(help="Measure speed and memory on this machine, without data.", no_args_is_help=True)

Recipe = Annotated[str, typer.Argument(help="A shipped recipe or a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="key=value", help="Settings that override the recipe's.")
]


@app.command()
def step(
    recipe: Recipe,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option(min=1, max=1_000_000, help="Steps to measure, after the warm-up.")] = 20,
    as_json: options.AsJson = False,
) -> None:
    """Measure a training step: its seconds, peak memory, and the masking process's share of the time.

    The data are random tokens in the task's shape. The result is the median over the measured steps.

    Example: `unmask bench step sudoku/paper_puma --json`
    """
    _print(bench.step(recipes.load(recipe, overrides or []), count=count), as_json)


@app.command()
def decode(
    recipe: Recipe,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Canvases to decode.")] = 32,
    as_json: options.AsJson = False,
) -> None:
    """Measure decoding: its seconds and forward passes, with random weights drawn from train.seed.

    Example: `unmask bench decode sudoku/paper_puma decode.tokens_per_step=3 --json`
    """
    _print(bench.decode(recipes.load(recipe, overrides or []), rows=rows), as_json)


@app.command()
def memory(
    recipe: Recipe,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option(min=10, max=10_000_000, help="Steps to take.")] = 2000,
    as_json: options.AsJson = False,
) -> None:
    """Measure how much peak memory grows between the first tenth of the steps and the last step.

    Example: `unmask bench memory debug --json`
    """
    _print(bench.memory(recipes.load(recipe, overrides or []), count=count), as_json)


def _print(result: dict[str, float | int | str], as_json: bool) -> None:
    if as_json:
        options.print_json(result)
        return
    out = options.results()
    for name, value in result.items():
        out.print(f"{name:>20}  {value:.4g}" if isinstance(value, float) else f"{name:>20}  {value}")
