"""Long carry chains (2605.29123): what the masks of a training do to sums whose digits have to wait for each other.

    python benchmarks/addition.py runs/addition --steps 3000 --seeds 0 1 2

Trains every arm with every seed, one after the other (what is there already goes on, or is taken as it is), decodes
held-out sums one digit a step, and prints the right ones of uniform digits and by the longest carry chain. Settings at
the end override the recipe's. Run from the root of the repository.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from unmask.cli import main as unmask
from unmask.decoding.config import DecodeConfig
from unmask.evaluation.accuracy import grade_answers
from unmask.evaluation.statistics import wilson
from unmask.tasks.addition.task import Addition
from unmask.training.loading import LoadedRun

ARMS = {
    "uniform": "process={name: uniform}",
    "puma": "process={name: puma, num_stages: 8, threshold: 0.9}",
    "run 2": "process={name: puma, num_stages: 8, threshold: 0.9, run: 2, start: uniform}",
    "run 4": "process={name: puma, num_stages: 8, threshold: 0.9, run: 4, start: uniform}",
    "puma, right to left": "process={name: puma, num_stages: 8, order: right_to_left}",
}
ORDERS = ("prob", "right_to_left")
Counts = dict[str, tuple[int, int]]
"""Right answers, and all, by kind of sum."""


def train(folder: Path, arm: str, seed: int, settings: list[str]) -> Path:
    run = folder / arm.replace(", ", "_").replace(" ", "_") / f"seed_{seed}"
    start = ["--resume"] if run.exists() else []
    if code := unmask(
        ["train", "addition/uniform", ARMS[arm], f"train.seed={seed}", *settings, "--out", str(run), *start]
    ):
        raise SystemExit(code)
    return run


def measure(run: Path, order: str, examples: int) -> Counts:
    """Decodes as many sums of uniform digits, and as many with each length of the longest chain."""
    loaded = LoadedRun.open(run)
    model, settings = loaded.prepare(), loaded.config.data.model_dump(exclude={"name"})
    most = settings["digits"][1]
    found: Counts = {}
    for kind, chain in [("uniform digits", None), *((f"chain {n}", (n, n)) for n in range(most + 1))]:
        task = Addition(Addition.Config(**{**settings, "test_chain": chain}))
        result = grade_answers(model, task, task.validation(examples), DecodeConfig(order=order)).over_all()
        found[kind] = (round(result.accuracy * result.n), result.n)
    return found


def print_table(found: dict[tuple[str, str], list[Counts]]) -> None:
    """Prints a row for each arm and order: right answers of all seeds, with the 95 % interval, and those of each."""
    kinds = list(next(iter(found.values()))[0])
    print("| arm | decoded | " + " | ".join(kinds) + " |\n" + "| --- " * (len(kinds) + 2) + "|")
    for (arm, order), seeds in found.items():
        cells = []
        for kind in kinds:
            right, n = (sum(counts[kind][i] for counts in seeds) for i in range(2))
            low, high = wilson(right, n)
            each = " / ".join(f"{counts[kind][0] / counts[kind][1]:.1%}" for counts in seeds)
            cells.append(f"{right / n:.1%} ({low:.1%} to {high:.1%})" + (f": {each}" if len(seeds) > 1 else ""))
        print(f"| {arm} | {order} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs lie, or will")
    parser.add_argument("settings", nargs="*", help="key=value, for all arms")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS], default=[*ARMS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--examples", type=int, default=200, help="sums of each kind")
    given = parser.parse_intermixed_args()
    found = defaultdict(list)
    for seed in given.seeds:
        for arm in given.arms:
            run = train(given.folder, arm, seed, [f"train.steps={given.steps}", *given.settings])
            for order in ORDERS:
                found[arm, order].append(measure(run, order, given.examples))
            print_table(found)


if __name__ == "__main__":
    main()
