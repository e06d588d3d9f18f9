"""Densities of times beside each other: what trainings reached, how soon, and the figure of both.

    python benchmarks/time_sampling.py OUT BASELINE [METHOD ...] [--page FIGURE.html]

OUT/METHOD/seed_N are the runs, as `unmask compare --out OUT` makes them. The table is Markdown.
"""

import argparse
from pathlib import Path
from statistics import mean, stdev

import figures
import torch

from unmask.lab.compare import Comparison
from unmask.lab.report.chart import Chart, Line
from unmask.lab.report.runs import RunsByMethod, read_run
from unmask.masking.time import DensityConfig
from unmask.progress import warn

MEASURE = "eval/nelbo"


def read(out: Path, methods: list[str]) -> RunsByMethod:
    return {name: [read_run(folder, warn) for folder in sorted((out / name).glob("seed_*"))] for name in methods}


def table(methods: RunsByMethod) -> None:
    """Steps to the value that all seeds of the baseline and of the method reached, as `unmask compare` has it."""
    print("| method | seeds | final NELBO, nats | NELBO of both | steps, baseline | steps | times fewer (95 %) |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    baseline = next(iter(methods))
    for name, runs in methods.items():
        final = [run.curve(MEASURE).values[-1] for run in runs]
        spread = f" ± {stdev(final):.4f}" if len(final) > 1 else ""
        shown = "| | | | 1"
        if name != baseline:
            (level,) = Comparison.of({each: methods[each] for each in (baseline, name)}, MEASURE).levels()
            ours, theirs = ([f"{cost.spent:.0f}" for cost in level.costs[each]["step"]] for each in (baseline, name))
            shown = (
                f"| {level.level:.4f} | {', '.join(ours)} | {', '.join(theirs)} | {level.speed_up_text(name, 'step')}"
            )
        print(f"| {name} | {len(runs)} | {mean(final):.4f}{spread} {shown} |")


def densities(methods: RunsByMethod) -> Chart:
    """Plot the density of each method that has one; the uniform one is flat."""
    t = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    lines = []
    for style, (name, runs) in enumerate(methods.items()):
        time = getattr(runs[0].config.process, "time", None)
        if isinstance(time, DensityConfig):
            lines.append(Line(name, style, list(zip(t.tolist(), time.density().density(t).tolist(), strict=True))))
    return Chart("Densities", "masked fraction t", "q(t)", lines, is_x_share=True)


def curves(methods: RunsByMethod) -> Chart:
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
    if missing := [name for name, runs in methods.items() if not runs]:
        parser.error(f"{asked.out}: no runs of {', '.join(missing)}")
    table(methods)
    if asked.page is not None:
        asked.page.write_text(figures.page([densities(methods), curves(methods)], list(methods)))


if __name__ == "__main__":
    main()
