"""The verb `unmask compare`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from unmask import formats, machine, paths
from unmask.cli import options, report
from unmask.config import recipes
from unmask.errors import UserError
from unmask.evaluation.evaluate import Cells
from unmask.lab.compare import (
    AXIS_NAMES,
    FEWEST_SEEDS,
    RESULTS,
    Comparison,
    Method,
    Plan,
    choose_measure,
)
from unmask.lab.finals import Finals
from unmask.lab.report.runs import about_other_data
from unmask.lab.trainings import Training, train_all
from unmask.progress import console, warn
from unmask.training.folder import RunFolder, command_line


def compare(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE.. [key=value]..",
            help="The baseline's recipe, then the recipes to compare with it; and settings for all of them.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'NAME: RECIPE [key=value]..'",
            help="One more to compare, after the recipes: a recipe with settings of its own, which win over those for "
            "all, and the name to call it by. May be repeated; without other recipes, the first is the baseline.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Trainings of each recipe, with the seeds 0, 1, ..")] = 3,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Budget: steps of each training (default: the recipe's).")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Budget: seconds of training, if that is sooner (default: no limit).")
    ] = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="Budget: examples drawn, if that is sooner (default: no limit).")
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(
            help="What to compare by, as in metrics.jsonl (default: the first decoder's rate; for text, eval/nelbo)."
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Trainings that run at once, sharing the cores (default: one per core).")
    ] = None,
    out: Annotated[
        str, typer.Option(metavar="FOLDER", help="Folder for the trainings, comparison.json and report.html.")
    ] = "comparison",
    as_json: options.AsJson = False,
    trust_code: options.TrustCode = False,
    follow_links: options.FollowLinks = False,
) -> None:
    """Train recipes, several seeds each, and measure how much sooner each is there than the first: in steps, seconds,
    forward passes and examples.

    How soon: the cost of 50 % and 90 %, and of the level to which every seed of both methods came. With three seeds or
    more there is a 95 % interval; if 1 is in it, the two are not told apart.

    Trainings in --out are resumed: a stopped comparison goes on, and you can add seeds later (and steps, if
    optim.schedule=constant). comparison.json and report.html (see `unmask report`) are rewritten each time, if they are
    of these methods.

    Examples:

    * `unmask compare sudoku/uniform sudoku/puma --seeds 3`

    * `unmask compare sudoku/uniform --method 'puma12: sudoku/puma process.num_stages=12' --steps 800 --out k12`

    * `unmask compare text/uniform_small --method 'muon: text/uniform_small optim.name=muon optim.lr=2e-3'`

    * `unmask compare sudoku/uniform --steps 2000 --method 'short: sudoku/uniform train.steps=1000'`: a schedule of its
    own, down after half of the steps
    """
    names = names or []
    settings = [name for name in names if "=" in name]
    for option, key, value in (
        ("--steps", "train.steps", steps),
        ("--seconds", "train.max_seconds", seconds),
        ("--examples", "train.max_examples", examples),
    ):
        if value is not None:
            if twice := [own for own in settings if recipes.gives(own, key)]:
                raise UserError(f"{twice[0]} and {option} {value} both say how long to train; give one")
            settings.append(f"{key}={value}")
    folder = paths.user_path(out, options.OUT)
    methods = [Method.of_recipe(name) for name in names if "=" not in name]
    methods += [Method.parse(text) for text in method or []]
    plan = Plan.make(methods, settings, seeds=seeds, out=folder)
    measure = choose_measure(measure, list(plan.configs.values()))
    plan.check_folders()
    _check_results(folder, {each.name: each.recipe for each in methods})
    options.make_out_folder(folder)
    queue = plan.queue
    with Live(console=console, refresh_per_second=2, transient=True) as live:
        count = min(jobs or machine.cpus(), len(queue))
        train_all(queue, count, lambda: live.update(_progress_table(queue)))
    runs = plan.read_runs(warn)
    comparison = Comparison.of(runs, measure)
    if said := about_other_data(runs):
        warn(said)
    own = {each.name: {"recipe": each.recipe, "settings": list(each.settings)} for each in methods}
    finals = Finals.of(runs)
    result = {"measure": measure, "settings": settings, "methods": own, "seeds": seeds} | comparison.as_dict()
    result["finals"] = finals.as_dict()
    options.write(folder / "comparison.json", formats.to_json(result, indent=1) + "\n")
    if as_json:
        options.print_json(result)
    else:
        _print(comparison, measure)
        _print_finals(finals)
    report.write(runs, folder / "report.html", measure=measure, commands=[command_line()])
    console.print(f"{folder / 'comparison.json'} holds all of it; open {folder / 'report.html'} in a browser to see it")


@dataclass(frozen=True)
class _Kept:
    methods: dict[str, dict[str, Any]]


def _check_results(out: Path, recipes: dict[str, str]) -> None:
    """Raises `UserError` if `out` holds results that are not of a comparison of some of these methods."""
    if RunFolder(out).exists():
        raise UserError(f"--out {out}: holds a training; name another folder")
    kept, page = (out / name for name in RESULTS)
    if not os.path.lexists(kept):
        if os.path.lexists(page):
            raise UserError(f"--out {out}: holds a {page.name} of something else; name another folder")
        return
    methods = formats.read_json(kept, _Kept).methods
    if any(recipes.get(name) != method.get("recipe") for name, method in methods.items()):
        raise UserError(f"--out {out}: holds the comparison of {', '.join(methods)}; name another folder")


def _progress_table(trainings: list[Training]) -> Table:
    table = Table(box=None)
    for column in ("training", "last line"):
        table.add_column(column, no_wrap=True)
    for training in trainings:
        lines = training.end_of_log().splitlines()
        folder = f"{training.folder.parent.name}/{training.folder.name}"
        table.add_row(folder, lines[-1][:90] if lines else "waiting")
    return table


def _print(comparison: Comparison, measure: str) -> None:
    out = options.results()
    out.print(_curves_table(comparison, measure))
    out.print(options.table(_finals(comparison)))
    options.print_lines(_cost_tables(comparison))
    for method in comparison.short_of_baseline():
        out.print(
            f"{method} took fewer steps, and ends short of {comparison.baseline}, which was in the middle of its "
            "schedule where that came: a baseline of the same steps would be fair."
        )
    if comparison.num_seeds < FEWEST_SEEDS and any(row.is_reached for row in comparison.rows()):
        out.print("With three seeds or more, there would be 95 % intervals; these ratios are not told from 1.")


def _print_finals(finals: Finals) -> None:
    """Prints every measure at the last evaluation, where there is more than the one that is compared."""
    if len(finals.means) > 1:
        out = options.results()
        own = [mean for each in finals.means.values() for mean in each.values() if mean.interval is not None]
        kinds = ["of the seeds"] * any(not mean.is_share for mean in own)
        kinds += ["of a share, of the examples"] * any(mean.is_share for mean in own)
        interval = f" [95 % interval {'; '.join(kinds)}]" if kinds else ""
        out.print(f"All measures at the last evaluation: mean over seeds{interval}")
        out.print(options.table(finals.table()))


def _curves_table(comparison: Comparison, measure: str) -> Table:
    interval = " [95 % interval of the examples]" if any(map(comparison.num_examples, comparison.methods)) else ""
    table = Table(title=f"{measure}, mean{interval} (least to most of the seeds)", title_justify="left")
    table.add_column("step", justify="right")
    at_steps: dict[float, dict[str, list[float]]] = {}
    for method, curves in comparison.methods.items():
        table.add_column(method, justify="right", overflow="fold")
        for curve in curves:
            for step, value in zip(curve.spent["step"], curve.values, strict=True):
                at_steps.setdefault(step, {}).setdefault(method, []).append(value)
    for step, values in sorted(at_steps.items()):
        table.add_row(
            f"{step:.0f}", *(_mean(comparison, method, values.get(method, [])) for method in comparison.methods)
        )
    return table


def _mean(comparison: Comparison, method: str, values: list[float]) -> str:
    if not values:
        return ""
    seeds = len(comparison.methods[method])
    shown = comparison.mean_text(values, comparison.num_examples(method))
    return shown + ("" if len(values) == seeds else f", {len(values)} of {seeds}")


def _finals(comparison: Comparison) -> Cells:
    rows = comparison.finals()
    has_interval = any(row[2] for row in rows)
    header = ("method", "value", *["95 % interval"] * has_interval, *(AXIS_NAMES[axis] for axis in comparison.axes))
    shown = [row if has_interval else [*row[:2], *row[3:]] for row in rows]
    return Cells(header, shown, "at the last evaluation, with what was spent until then")


def _cost_tables(comparison: Comparison) -> list[Cells]:
    """Makes a table for each level, with a row for each method: its width does not grow with their number."""
    header = ("in", "method", "mean (least to most of the seeds)", f"times fewer than {comparison.baseline}")
    tables: list[Cells] = []
    for level in comparison.levels():
        rows = []
        for axis in comparison.axes:
            for method in comparison.methods:
                ratio = level.speed_up_text(method, axis) if method in comparison.others else ""
                rows.append((AXIS_NAMES[axis], method, level.cost_text(method, axis), ratio))
        tables.append(Cells(header, rows, f"what it cost to get to {level.name}"))
    return tables
