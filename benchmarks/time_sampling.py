"""Densities of times beside each other: what trainings reached, how soon, and the figure of both.

    python benchmarks/time_sampling.py OUT BASELINE [METHOD ...] [--page FIGURE.html]

OUT/METHOD/seed_N are the runs, as `unmask compare --out OUT` makes them. The table is Markdown.
"""

import argparse
from pathlib import Path
from statistics import mean, stdev

import figures
import torch

from unmask.masking.densities import FixedConfig
from unmask.progress import warn
from unmask.report.chart import Chart, Line
from unmask.report.comparison import Comparison, Level
from unmask.report.runs import Methods, read_run

MEASURE = "eval/nelbo"


def read(out: Path, methods: list[str]) -> Methods:
    return {name: [read_run(folder, warn) for folder in sorted((out / name).glob("seed_*"))] for name in methods}


def table(methods: Methods) -> None:
    comparison = Comparison({name: [run.curve(MEASURE) for run in runs] for name, runs in methods.items()})
    level = comparison.levels()[0]
    print(f"To the {level.name}:\n")
    print("| method | seeds | final NELBO, nats | steps | times fewer steps | seconds | times fewer seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in methods:
        print(f"| {name} | {row(comparison, level, name)} |")


def row(comparison: Comparison, level: Level, name: str) -> str:
    final = [curve.values[-1] for curve in comparison.methods[name]]
    spread = f" ± {stdev(final):.4f}" if len(final) > 1 else ""
    cells = [str(len(final)), f"{mean(final):.4f}{spread}"]
    for axis in ("step", "seconds"):
        faster = "1" if name == comparison.baseline else level.speed_up_text(name, axis)
        cells += [level.cost_text(name, axis), faster]
    return " | ".join(cells)


def densities(methods: Methods) -> Chart:
    """Those that do not change while training; the uniform one is flat."""
    t = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    lines = []
    for style, (name, runs) in enumerate(methods.items()):
        time = getattr(runs[0].config.process, "time", None)
        if isinstance(time, FixedConfig):
            lines.append(Line(name, style, list(zip(t.tolist(), time.density().density(t).tolist(), strict=True))))
    return Chart("Densities", "masked fraction t", "q(t)", lines, is_x_share=True)


def curves(methods: Methods) -> Chart:
    lines = []
    for style, (name, runs) in enumerate(methods.items()):
        each = [list(zip(c.spent["step"], c.values, strict=True)) for c in (run.curve(MEASURE) for run in runs)]
        points = [(step[0][0], mean(value for _, value in step)) for step in zip(*each, strict=False)]
        lines.append(Line(name, style, points, each))
    return Chart("Held-out NELBO", "training steps", "nats per token", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--page", type=Path)
    asked = parser.parse_args()
    methods = read(asked.out, asked.methods)
    table(methods)
    if asked.page is not None:
        asked.page.write_text(figures.page([densities(methods), curves(methods)], list(methods)))


if __name__ == "__main__":
    main()
