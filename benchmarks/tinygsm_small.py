"""The tables of benchmarks/tinygsm_small.sh, as Markdown: `python benchmarks/tinygsm_small.py OUT`."""

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from unmask.lab.report.curves import read_metrics
from unmask.progress import warn

Rows = list[dict[str, Any]]


def read(run: Path) -> Rows:
    return read_metrics(run, warn)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    cells = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    cells.insert(1, ["---"] * len(cells[0]))
    print("\n".join(f"| {' | '.join(row)} |" for row in cells) + "\n")


def curves(runs: dict[str, Rows]) -> None:
    """NELBO (nats per maskable token) at each evaluation."""
    steps = sorted({row["step"] for rows in runs.values() for row in rows if "eval/nelbo" in row})
    body = []
    for name, rows in runs.items():
        found = {row["step"]: row for row in rows if "eval/nelbo" in row}
        values = [f"{found[step]['eval/nelbo']:.4f}" if step in found else "" for step in steps]
        last = rows[-1]
        body.append([name, *values, f"{last['seconds']:.0f}", last["examples_seen"]])
    table(["run", *(f"step {step}" for step in steps), "seconds", "rows drawn"], body)


def costs(runs: dict[str, Rows]) -> None:
    """Steps to the final NELBO of the uniform run of the same seed, between evaluations on a straight line."""
    body = []
    for name, rows in runs.items():
        baseline = runs.get(f"uniform_small/{name.split('/')[1]}")
        if baseline is None or name.startswith("ar_"):
            continue
        target = [row["eval/nelbo"] for row in baseline if "eval/nelbo" in row][-1]
        points = [(row["step"], row["eval/nelbo"]) for row in rows if "eval/nelbo" in row]
        body.append([name, f"{target:.4f}", crossing(points, target)])
    table(["run", "the baseline's last", "steps to it"], body)


def crossing(points: list[tuple[int, float]], target: float) -> str:
    for (before, high), (after, low) in pairwise(points):
        if low <= target < high:
            return f"{before + (after - before) * (high - target) / (high - low):.0f}"
    return "at its first evaluation" if points[0][1] <= target else "not reached"


def pools(runs: dict[str, Rows]) -> None:
    """What a PUMA pool did, by K: steps that a row lived (1 / the share of rows that finish in a step), reveals."""
    body = []
    for name, rows in runs.items():
        by_stages: dict[Any, Rows] = defaultdict(list)
        for row in rows:
            if "puma/finished_share" in row:
                by_stages[row.get("puma/num_stages")].append(row)
        for stages, own in by_stages.items():
            share = statistics.mean(row["puma/finished_share"] for row in own)
            revealed = statistics.mean(row["puma/revealed_per_row"] for row in own)
            scored = statistics.mean(row["train/scored_per_row"] for row in own)
            k = "" if stages is None else f"{stages:.0f}"
            lived = f"{1 / share:.1f}" if share else "-"
            body.append([name, k, f"{own[0]['step']} to {own[-1]['step']}", lived, f"{revealed:.0f}", f"{scored:.0f}"])
    table(["run", "K", "steps", "steps a row lives", "tokens revealed a step", "tokens in the loss"], body)


def scores(folders: dict[str, Path]) -> None:
    """Programs written for held-out rows and for GSM8K: shares that parse, run, are right."""
    body = []
    for name, folder in folders.items():
        for data in ("heldout", "gsm8k"):
            path = folder / f"{data}.json"
            if not path.exists() or not path.read_text():
                continue
            result = json.loads(path.read_text())
            for decoder, shares in result["shares"].items():
                low, high = result["interval"][decoder]
                likelihood = "" if result["nelbo"] is None else f"{result['nelbo']:.4f} ± {result['nelbo_stderr']:.4f}"
                right = f"{shares['accuracy']:.1%} ({low:.1%} to {high:.1%})"
                parts = [f"{shares['parses']:.0%}", f"{shares['runs']:.0%}", right, f"{result['nfe'][decoder]:.0f}"]
                body.append([name, data, decoder, result["protocol"]["examples"], *parts, likelihood])
    table(["run", "data", "decoder", "problems", "parse", "run", "right", "NFE", "NLL or NELBO"], body)


def main(out: Path) -> None:
    folders = {
        f"{path.parent.parent.name}/{path.parent.name}": path.parent for path in out.glob("runs/*/*/metrics.jsonl")
    }
    order = ("uniform_small", "puma_small", "puma_variable", "ar_small", "uniform_from", "puma_from")
    names = sorted(folders, key=lambda name: ([name.startswith(prefix) for prefix in order].index(True), name))
    runs = {name: read(folders[name]) for name in names}
    for show in (curves, costs, pools):
        show(runs)
    scores({name: folders[name] for name in names})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
