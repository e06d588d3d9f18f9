"""The demo: one small model learns Sudoku twice, on uniform masks and with PUMA, side by side; then both solve puzzles.

    python examples/demo.py        (or `make demo`, which sets everything up)

It is `unmask compare` with a table to watch. Stop it with Ctrl-C whenever you like: the runs are saved, and the same
command goes on. Everything goes into `demo/`.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table

from unmask.errors import Interrupted, UserError
from unmask.lab.report.curves import read_metrics
from unmask.lab.trainings import Training, TrainingFailed, train_all
from unmask.tasks.sudoku import board
from unmask.tasks.sudoku.generator import generate

METHODS = ("uniform", "puma")
FOLDER = Path("demo")
RUNS = {name: FOLDER / f"sudoku-{name}" / "seed_0" for name in METHODS}  # where `unmask compare` has them
PUZZLES = FOLDER / "puzzles.txt"
NUM_PUZZLES = 100
MAX_SECONDS = 660.0  # of training, for machines that do not get through the recipe's steps in that time
SETTINGS = (f"train.max_seconds={MAX_SECONDS}",)
MORE_TRAINING = (
    "Boards this easy hardly tell the methods apart, but for the examples drawn. With 17 givens and more training, "
    "PUMA solves 53 % and uniform masks 47 % after 2,400 steps, which 3 seeds do not tell apart, from a third of the "
    "examples (benchmarks/results/hard_boards_*.md)."
)
console = Console(highlight=False)


def main() -> int:
    started = time.monotonic()
    FOLDER.mkdir(exist_ok=True)
    threads = max(1, (os.cpu_count() or 2) // 2)
    console.print(
        "Two masked diffusion models learn to solve Sudoku, from nothing: [bold]uniform[/]\n"
        "trains on random masks, [bold]puma[/] on those that it would meet when solving.\n"
        f"Same network, same steps, side by side, with {threads} CPU thread{'s' * (threads > 1)} each.\n"
        "Ctrl-C stops and saves; `make demo` goes on.\n"
    )
    if not train_both():
        return 130
    console.print()
    solve_fresh_puzzles(threads)
    compare()
    console.print(MORE_TRAINING)
    console.print(f"\nThis took {(time.monotonic() - started) / 60:.1f} minutes. What you can do next:")
    console.print(f"  open {FOLDER}/report.html in a browser: the curves, puzzles being solved, what each trained on")
    console.print(f"  {unmask_name()} eval {RUNS['puma']} --decoder margin --decoder random")
    console.print(f"  {unmask_name()} decode {RUNS['puma']} {PUZZLES} --watch")
    return 0


def train_both() -> bool:
    """Trains in two processes, with a live table; False if it was interrupted."""
    trainings = [Training(f"sudoku/{name}", (*SETTINGS, "train.seed=0"), folder) for name, folder in RUNS.items()]
    try:
        with Live(console=console, refresh_per_second=2) as live:
            train_all(trainings, len(METHODS), lambda: live.update(progress_table()))
    except Interrupted:
        console.print("Stopped and saved; `make demo` goes on from here.")
        return False
    except TrainingFailed as error:
        sys.exit(str(error))
    return True


def compare() -> None:
    """Finds both runs trained, and writes `comparison.json` and `report.html`."""
    recipes = [f"sudoku/{name}" for name in METHODS]
    budget = ["--seconds", str(MAX_SECONDS), "--seeds", "1"]
    console.print(f"\n$ unmask compare {' '.join([*recipes, *budget])} --out {FOLDER}")
    subprocess.run([*unmask(), "compare", *recipes, *budget, "--out", str(FOLDER)], check=True)


def unmask() -> list[str]:
    return [sys.executable, "-m", "unmask"]


def unmask_name() -> str:
    """How the user would call it: with the environment's folder, if that is below this one."""
    path = Path(sys.executable).parent / "unmask"
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else "unmask"


def metrics_of(name: str) -> list[dict[str, float]]:
    """As far as they are written."""
    try:
        return read_metrics(RUNS[name], warn=lambda line: None)
    except UserError:  # not begun
        return []


def progress_table() -> Table:
    """Both runs, evaluation by evaluation, and where they are now."""
    metrics = {name: metrics_of(name) for name in METHODS}
    solved = {
        name: {int(row["step"]): row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
        for name, rows in metrics.items()
    }
    table = Table(title="held-out boards solved, three cells a step", title_justify="left")
    table.add_column("step", justify="right")
    for name in METHODS:
        table.add_column(name, min_width=28)
    for step in sorted({step for by_step in solved.values() for step in by_step}):
        table.add_row(str(step), *(bar(solved[name].get(step)) for name in METHODS))
    table.add_section()
    table.add_row("now", *(status(metrics[name]) for name in METHODS))
    return table


def bar(share: float | None) -> str:
    return "" if share is None else f"{share:6.1%} " + "█" * round(20 * share)


def status(rows: list[dict[str, float]]) -> str:
    steps = [row for row in rows if "train/loss" in row]
    if not steps:
        return "making puzzles ..."
    last = steps[-1]
    speed = last["seconds"] / last["step"]
    return f"step {last['step']:.0f}, {speed:.2f} s each,\n{last['examples_seen']:,.0f} examples drawn"


def solve_fresh_puzzles(threads: int) -> None:
    """New puzzles, from another seed: one is solved before your eyes, all of them are graded."""
    if not PUZZLES.exists():
        puzzles, _ = generate(NUM_PUZZLES, givens=(32, 44), difficulty="singles", seed=1)
        PUZZLES.write_text(
            "".join(f"{board.to_text(puzzle)}\n" for puzzle in puzzles[np.argsort(-(puzzles > 0).sum(1))])
        )
    environment = os.environ | {"OMP_NUM_THREADS": str(2 * threads)}
    console.print(f"[bold]puma[/] solves one of {NUM_PUZZLES} new puzzles, the cells that it is surest of first:\n")
    first = PUZZLES.read_text().splitlines()[0]
    watch = [*unmask(), "decode", str(RUNS["puma"]), "--watch", "--decoder", "prob,tokens_per_step=1"]
    subprocess.run(watch, input=f"{first}\n", text=True, stdout=subprocess.DEVNULL, check=True, env=environment)
    table = Table(title=f"{NUM_PUZZLES} new puzzles", title_justify="left")
    for column in ("model", "one cell a step", "three cells a step", "examples drawn", "seconds of training"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in METHODS:
        last = metrics_of(name)[-1]
        shares = [decode_and_grade(name, tokens, environment) for tokens in (1, 3)]
        table.add_row(name, *shares, f"{last['examples_seen']:,.0f}", f"{last['seconds']:.0f}")
    console.print()
    console.print(table)


def decode_and_grade(name: str, tokens_per_step: int, environment: dict[str, str]) -> str:
    answers = FOLDER / f"{name}_{tokens_per_step}.jsonl"
    for own in (answers, answers.with_name(f"{answers.name}.part")):  # of an earlier run, that was stopped perhaps
        own.unlink(missing_ok=True)
    decoder = f"prob,tokens_per_step={tokens_per_step}"
    decode = [*unmask(), "decode", str(RUNS[name]), str(PUZZLES), "--out", str(answers), "--decoder", decoder]
    subprocess.run(decode, check=True, env=environment)
    grade = [*unmask(), "grade", str(answers), "--task", "sudoku", "--json"]
    result = json.loads(subprocess.run(grade, check=True, capture_output=True, text=True).stdout)
    return f"{result['correct']} of {result['n']} solved"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # while it solves and compares
        console.print("Stopped; `make demo` goes on from here.")
        sys.exit(130)
