"""`unmask compare`."""

import json
import os
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import typer
from rich.live import Live
from rich.table import Table

from unmask.cli import options, report
from unmask.config import recipes
from unmask.config.run import RunConfig
from unmask.errors import UserError
from unmask.lab.compare import FEWEST_SEEDS, Comparison
from unmask.lab.report.curves import Curve
from unmask.lab.report.runs import MOST_METHODS, read_run
from unmask.lab.report.trainings import Training, check_budget, train_all
from unmask.progress import console, warn
from unmask.training.evaluating import rates
from unmask.training.folder import RunFolder, command_line


def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE.. [key=value]..",
            help="The baseline's recipe, then those to hold beside it; and settings over all of them.",
            show_default=False,
        ),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each recipe; their seeds are 0, 1, ..")] = 3,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Budget of each training; the recipe's unless given.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Budget: seconds of training, if that is sooner.")] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Budget: examples drawn, if that is sooner.")] = None,
    measure: Annotated[
        str | None,
        typer.Option(
            help="What to compare by, as in metrics.jsonl: the first decoder's rate unless given; of text, eval/nelbo."
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Trainings at once, sharing the cores; as many as cores unless given.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of the trainings, of comparison.json and report.html.")] = Path(
        "comparison"
    ),
    as_json: options.AsJson = False,
) -> None:
    """Train recipes on the same budget, several seeds each, and say how much sooner one is than the first.

    What is there in --out is resumed: a stopped comparison goes on, and more seeds can be added later; more steps too,
    if optim.schedule=constant. Its comparison.json and report.html (see `unmask report`) are made anew each time.

    Examples:

    * `unmask compare sudoku/uniform sudoku/puma --seeds 3`

    * `unmask compare sudoku/uniform sudoku/puma process.num_stages=12 --steps 800 --out k12`
    """
    chosen, overrides = _split(names)
    budget = {"train.steps": steps, "train.max_seconds": seconds, "train.max_examples": examples}
    settings = [*overrides, *(f"{key}={value}" for key, value in budget.items() if value is not None)]
    trainings = {_method(recipe): _of_one(recipe, settings, seeds, out) for recipe in chosen}
    in_turn = [training for of_one_seed in zip(*trainings.values(), strict=True) for training in of_one_seed]
    configs = {training: recipes.load(training.recipe, training.settings) for training in in_turn}
    if len(tasks := {config.task.name for config in configs.values()}) > 1:
        raise UserError(f"compare {' '.join(chosen)}: of different tasks ({', '.join(sorted(tasks))}); give one task's")
    measure = _check_measure(measure, list(configs.values()))
    for training, config in configs.items():
        RunFolder(training.folder).check(config, resume=True)
        check_budget(training.folder, config)
    options.make_folder(out)
    with Live(console=console, refresh_per_second=2, transient=True) as live:
        count = min(jobs or os.cpu_count() or 1, len(in_turn))
        train_all(in_turn, count, lambda: live.update(_progress_table(in_turn)))
    methods = {method: [read_run(training.folder, warn) for training in of_one] for method, of_one in trainings.items()}
    comparison = Comparison({method: [run.curve(measure) for run in runs] for method, runs in methods.items()})
    result = {"measure": measure, "settings": settings, "seeds": seeds} | comparison.as_dict()
    options.write(out / "comparison.json", json.dumps(result, indent=1) + "\n")
    if as_json:
        options.print_json(result)
    else:
        _print(comparison, measure)
    report.write(methods, out / "report.html", measure=measure, commands=[command_line()])
    console.print(f"{out / 'comparison.json'} holds all of it; open {out / 'report.html'} in a browser to see it")


def _check_measure(measure: str | None, configs: list[RunConfig]) -> str:
    """Before anything is trained: a share that every training will evaluate, or the NELBO."""
    common = [rate for rate in rates(configs[0]) if all(rate in rates(config) for config in configs)]
    common += ["eval/nelbo"]
    if rates(configs[0]) and len(common) == 1 and measure is None:
        raise UserError(
            "--measure: these recipes evaluate no rate in common; set eval.* alike for all, or give eval/nelbo"
        )
    if measure not in (None, *common):
        raise UserError(f"--measure {measure}: not what all of these recipes evaluate; give one of {', '.join(common)}")
    return measure or common[0]


def _split(names: list[str]) -> tuple[list[str], list[str]]:
    chosen = [name for name in names if "=" not in name]
    if len(chosen) < 2 or len(set(map(_folder, chosen))) < len(chosen):
        raise UserError(f"compare {' '.join(chosen)}: give two recipes or more, each once and of another name")
    if len(chosen) > MOST_METHODS:
        raise UserError(
            f"compare: {len(chosen)} recipes are more than a page can tell apart; give {MOST_METHODS} at most"
        )
    return chosen, [name for name in names if "=" in name]


def _of_one(recipe: str, settings: list[str], seeds: int, out: Path) -> list[Training]:
    folder = out / _folder(recipe)
    return [Training(recipe, (*settings, f"train.seed={seed}"), folder / f"seed_{seed}") for seed in range(seeds)]


def _method(recipe: str) -> str:
    """What a recipe is called in the tables: `sudoku/puma`; `mine` for path/to/mine.yaml."""
    return recipe if recipe in recipes.names() else Path(recipe).stem


def _folder(recipe: str) -> str:
    """Of its trainings, within --out: `sudoku-puma`."""
    return _method(recipe).replace("/", "-")


def _progress_table(trainings: list[Training]) -> Table:
    table = Table(box=None)
    for column in ("training", "last line"):
        table.add_column(column, no_wrap=True)
    for training in trainings:
        lines = training.log.read_text(errors="replace").splitlines() if training.log.exists() else []
        folder = f"{training.folder.parent.name}/{training.folder.name}"
        table.add_row(folder, lines[-1][:90] if lines else "waiting")
    return table


def _print(comparison: Comparison, measure: str) -> None:
    out = options.results()
    out.print(_curves_table(comparison, measure))
    out.print(_cost_table(comparison))
    if comparison.num_seeds < FEWEST_SEEDS:
        out.print("With three seeds or more, there would be 95 % intervals.")


def _curves_table(comparison: Comparison, measure: str) -> Table:
    table = Table(title=f"{measure}, mean and standard deviation over seeds", title_justify="left")
    table.add_column("step", justify="right")
    for method in comparison.methods:
        table.add_column(method, justify="right")
    steps = sorted({step for curves in comparison.methods.values() for curve in curves for step in curve.spent["step"]})
    for step in steps:
        table.add_row(f"{step:.0f}", *(_at(comparison, curves, step) for curves in comparison.methods.values()))
    return table


def _at(comparison: Comparison, curves: list[Curve], step: float) -> str:
    values = [value for c in curves for value, own in zip(c.values, c.spent["step"], strict=True) if own == step]
    if not values:
        return ""
    spread = f" ± {comparison.text(stdev(values))}" if len(values) > 1 else ""
    of_all = "" if len(values) == len(curves) else f", {len(values)} of {len(curves)}"
    return comparison.text(mean(values)) + spread + of_all


def _cost_table(comparison: Comparison) -> Table:
    table = Table(title="what it cost to get there: mean (least to most of the seeds)", title_justify="left")
    table.add_column("to")
    table.add_column("in")
    for method in comparison.methods:
        table.add_column(method, justify="right")
    for method in comparison.others:
        table.add_column(f"{method}: times fewer", justify="right")
    for row in comparison.rows():
        if row.level and table.row_count:
            table.add_section()
        table.add_row(row.level, row.axis, *row.costs, *row.ratios)
    return table
