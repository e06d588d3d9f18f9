"""All that wants a GPU, within a number of minutes: its tests, the speed of a step, and the PUMA paper's Sudoku.

    benchmarks/gpu.sh [--out runs/gpu] [--minutes 9] [--reference PUMA] [--results FILE.tar.gz]

1. The tests marked `gpu`; meanwhile, on the CPUs, the puzzles are generated (1.8 million, kept in OUT/cache).
2. `unmask bench step`: tokens a second, peak memory, and the share of the rate of a bfloat16 matrix product here.
3. With --reference, `against_reference.py`: a step of both systems.
4. Until the time is up, sudoku/paper_uniform and sudoku/paper_puma side by side, with evaluations as they go.

OUT/summary.md and summary.json say what came out, after every part. The same command again leaves out what is done and
goes on with both trainings from their checkpoints; so it does after Ctrl-C, SIGTERM or a crash. --results packs
summary, logs and metrics into one small file at the end, however it comes. No part needs a network. A machine that
lacks packages is given them as wheels, in a folder .wheels here, before:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_17_x86_64 \
      -d .wheels -r benchmarks/gpu_wheels.txt

--small is a rehearsal for a CPU, with small models and few puzzles. Exit codes: 0 done, 1 a part failed (the others are
run all the same).
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unmask import files, formats
from unmask.config import recipes
from unmask.errors import UserError
from unmask.lab.report.curves import read_metrics
from unmask.lab.trainings import Training, lifeline, stop
from unmask.models.cost import count_parameters
from unmask.models.transformer_config import TransformerConfig
from unmask.tasks.task import build_task

METHODS = ("sudoku/paper_uniform", "sudoku/paper_puma")
SPEED = ("sudoku/paper_uniform", "sudoku/paper_puma", "tinygsm/puma")
SMALL = ["model.dim=32", "model.ff_dim=64", "model.num_layers=1", "model.num_heads=2", "train.batch_size=4"]
GPU_TESTS = ("tests/test_gpu.py", "tests/test_noise.py", "tests/training/test_bad_numbers.py")
SAVING = 25  # seconds that a training is given to end its step, evaluation and checkpoint, before the time is up


@dataclass
class Call:
    """One call: its folder, what earlier ones found, when it ends, and the seconds kept for the trainings."""

    out: Path
    is_small: bool
    ends: float
    reserve: float
    found: dict[str, Any]
    has_failed: bool = False

    def left(self) -> float:
        return self.ends - time.monotonic()

    def run(self, name: str, command: list[str], *, most: float, good: Collection[int] = (0,)) -> str | None:
        """Runs a command for at most `most` seconds; returns its output, None if it failed, or had too little time.

        An exit code in `good` is no failure.
        """
        seconds = min(most, self.left() - self.reserve)
        if seconds < SAVING:
            print(f"{self.left():4.0f} s left: {name} is left to another call", flush=True)
            return None
        print(f"{self.left():4.0f} s left: {name}", flush=True)
        with (self.out / f"{name}.log").open("w") as log, started(command, log) as process:
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            ended = process.poll()
        text = (self.out / f"{name}.log").read_text(errors="replace")
        if ended in good:
            return text
        why = "took too long" if ended is None else f"ended with {ended}"
        print(f"  {why}: {self.out / name}.log: {(text.strip().splitlines() or [''])[-1][:200]}", flush=True)
        self.has_failed = True
        return None

    def keep(self, name: str, value: Any) -> None:
        """Notes what a part found, and writes the summary anew."""
        self.found[name] = value
        files.write(self.out / "summary.json", json.dumps(self.found, indent=1))
        files.write(self.out / "summary.md", summary(self.found))


@contextmanager
def started(command: list[str], log: Any) -> Iterator[subprocess.Popen[str]]:
    """Starts a command in a process group of its own, and ends all of the group."""
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        yield process
    finally:
        # First a signal that lets a compiler delete what it has not finished: later calls would find it in its cache.
        try:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
        finally:  # also after a second Ctrl-C
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=9.0, help="all of it ends before")
    parser.add_argument("--reference", type=Path, help="a clone of JaeyeonKim01/PUMA")
    parser.add_argument("--steps", type=int, default=40_000, help="of each training, whose learning rate falls to 0")
    parser.add_argument("--small", action="store_true", help="a rehearsal, on a CPU too")
    parser.add_argument("--results", type=Path, metavar="FILE", help="pack summary, logs and metrics into it (.tar.gz)")
    asked = parser.parse_args()
    if asked.results is not None:
        check_results(asked.results, parser)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))  # ends what was started, packs results
    out = asked.out.resolve()  # runs compare it with the folder that they began with
    out.mkdir(parents=True, exist_ok=True)
    seconds = 60 * asked.minutes
    already = time.time() - float(os.environ.get("GPU_STARTED", time.time()))
    found = read_object(out / "summary.json")
    call = Call(out, asked.small, time.monotonic() + seconds - already, 0.4 * seconds, found)
    try:
        do(call, asked)
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
        return 130
    finally:
        if asked.results is not None:
            pack(out, asked.results)
    print(f"\n{(out / 'summary.md').read_text()}")
    return int(call.has_failed)


def do(call: Call, asked: argparse.Namespace) -> None:
    """Does all parts, as far as the time allows."""
    call.keep("machine", call.found.get("machine") or machine())
    with Path(os.devnull).open("w") as nowhere, started(puzzles(call), nowhere) as generating:
        test(call)
        speed(call)
        if asked.reference is not None:
            against_reference(call, asked.reference)
        with suppress(subprocess.TimeoutExpired):
            generating.wait(max(1, call.left() - 2 * SAVING))
    train(call, asked.steps)


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object; empty if there is none that is whole."""
    with suppress(UserError):
        return dict(formats.read_json(path, dict[str, Any]))
    return {}


def check_results(target: Path, parser: argparse.ArgumentParser) -> None:
    """Ends the program if the file of --results cannot be written, or is there and no such file."""
    if target.is_dir() or (target.exists() and not tarfile.is_tarfile(target)):
        parser.error(f"--results {target}: is there, and is no file of results; name another")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--results {target}: {error}")


def pack(out: Path, target: Path) -> None:
    """Packs what says how it went, without checkpoints and puzzles."""
    found = [*out.glob("*.*"), *out.glob("*/*.jsonl"), *out.glob("*/*.yaml"), *out.glob("*/*.json")]
    paths = sorted(path for path in found if path.is_file() and path != target.resolve())
    aside = target.with_name(f".{target.name}.new")
    with tarfile.open(aside, "w:gz") as packed:
        for path in paths:
            packed.add(path, path.relative_to(out))
    aside.replace(target)


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def machine() -> dict[str, Any]:
    """Describes the device, and measures its bfloat16 matrix product in operations a second."""
    is_cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if is_cuda else "CPU"
    size = 8192 if is_cuda else 1024
    one = torch.randn(size, size, device="cuda" if is_cuda else "cpu", dtype=torch.bfloat16)
    for rounds in (3, 10):  # the first ones warm up
        _wait()
        began = time.perf_counter()
        for _ in range(rounds):
            one @ one
        _wait()
    seconds = (time.perf_counter() - began) / rounds
    return {"device": name, "torch": torch.__version__, "cpus": os.cpu_count(), "product_flops": 2 * size**3 / seconds}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def test(call: Call) -> None:
    """Runs the tests marked `gpu`; those that fail are named."""
    only = [] if torch.cuda.is_available() else ["--collect-only"]  # a rehearsal
    # Without addopts, as what checks its types cannot be compiled; these files, as to import all takes a minute.
    command = python("-m", "pytest", "-o", "addopts=", "-m", "gpu", "-q", *only, *GPU_TESTS)
    if "tests" not in call.found and (said := call.run("tests", command, most=150, good=(0, 1))):
        *before, last = said.strip().splitlines() or [""]
        failed = [line.split(" - ")[0] for line in before if line.startswith(("FAILED ", "ERROR "))]
        was_run = re.search(r"(passed|failed|errors?|collected).* in [0-9.:]+s", last) is not None
        call.has_failed |= bool(failed) or not was_run
        if was_run:
            call.keep("tests", "; ".join([last, *failed]))
        else:
            print(f"  {call.out / 'tests.log'}: {last[:200]}", flush=True)


def data(call: Call) -> list[str]:
    """Returns the settings of the puzzles."""
    return [f"data.puzzles={2000 if call.is_small else 1_800_000}", f"data.cache_dir={call.out / 'cache'}"]


def puzzles(call: Call) -> list[str]:
    """Returns the command that generates the puzzles, and keeps them."""
    make = "import sys; from unmask.config import recipes; from unmask.tasks.task import build_task"
    code = f"{make}; build_task(recipes.load({METHODS[0]!r}, sys.argv[1:])).train_stream(0)"
    # nice: the tests and the timed steps next to it launch kernels from the CPU
    return ["nice", "-n", "19", *python("-c", f"if __name__ == '__main__':\n  {code}", *data(call))]


def speed(call: Call) -> None:
    """Measures a step of each recipe."""
    rows = call.found.setdefault("speed", {})
    for recipe in SPEED:
        if recipe in rows:
            continue
        settings = SMALL if call.is_small else ["train.batch_size=32"]
        count = "4" if call.is_small else "40"
        command = python("-m", "unmask", "bench", "step", recipe, "--count", count, "--json", *settings)
        if said := call.run(f"step_{recipe.replace('/', '_')}", command, most=120):
            result = json.loads(next(line for line in reversed(said.splitlines()) if line.startswith("{")))
            rows[recipe] = result | rates(recipe, settings, result["seconds_per_step"], result["scored_per_row"])
            call.keep("speed", rows)


def rates(recipe: str, settings: list[str], seconds: float, scored_per_row: float) -> dict[str, float]:
    """Returns tokens and operations a second: for each token 6 a matrix entry, and 12 dim L a layer for attention.

    The head, and what follows attention in the last layer, are computed at the positions that are scored alone.
    """
    config = recipes.load(recipe, [*settings, "data.puzzles=8"] if recipe.startswith("sudoku") else settings)
    model, tokens = config.model, build_task(config).tokens
    assert isinstance(model, TransformerConfig)
    count = config.train.batch_size * tokens.length
    looked_up = model.dim * (tokens.vocab_size * (not model.tied_head) + tokens.length * model.learned_positions)
    matrices = count_parameters(model, tokens) - looked_up
    at_scored = model.dim * (model.num_heads * model.head_width + 3 * model.ff_dim + tokens.vocab_size)
    used = matrices - at_scored * (1 - scored_per_row / tokens.length)
    flops = count * (6 * used + 12 * model.num_layers * model.dim * tokens.length)
    return {"tokens_per_second": count / seconds, "flops": flops / seconds}


def against_reference(call: Call, folder: Path) -> None:
    """Measures a step of both systems; a row that is there is not measured again."""
    rows = call.found.setdefault("reference", {})
    batch, steps = ("2", "2") if call.is_small else ("32", "20")
    for name in ("sudoku-step", "tinygsm-step"):
        if name in rows:
            continue
        kept = call.out / f"reference_{name}.json"
        options = ["--rounds", "1", "--batch", batch, "--steps", steps, "--without-alone", "--json", str(kept)]
        command = python("benchmarks/against_reference.py", "--reference", str(folder), "--only", name, *options)
        if call.run(f"reference_{name}", command, most=120):
            rows |= read_object(kept).get("rows", {})
            call.keep("reference", rows)


def train(call: Call, steps: int) -> None:
    """Trains both methods side by side until the time is up; a call after that goes on."""
    every = 50 if call.is_small else 1000
    settings = [*data(call), f"train.steps={steps}", f"train.checkpoint_every={every}", f"eval.every={every}"]
    settings += [f"eval.examples={every // 2}", "eval.orders=[prob]", "eval.tokens_per_step=[1,3]", "log.every=100"]
    settings += SMALL if call.is_small else []
    trainings = [Training(recipe, tuple(settings), call.out / recipe.rpartition("/")[2]) for recipe in METHODS]
    threads = max(1, (os.cpu_count() or 1) // len(trainings))
    with lifeline() as line:
        running = {training: training.start(threads, line) for training in trainings}
        print(f"{call.left():4.0f} s left: trainings", flush=True)
        try:
            while call.left() > SAVING and any(process.poll() is None for process in running.values()):
                time.sleep(1)
                call.keep("training", {training.recipe: evaluations(training.folder) for training in trainings})
        finally:
            stop(running.values(), min(SAVING, max(1, call.left())))
    for training, process in running.items():
        if process.returncode not in (0, 128 + signal.SIGTERM, 130):
            print(f"  {training.recipe} ended with {process.returncode}: {training.log}", flush=True)
            call.has_failed = True
    call.keep("training", {training.recipe: evaluations(training.folder) for training in trainings})


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """Reads a run's evaluations, without those that a resumed run has cancelled."""
    with suppress(UserError):
        rows = read_metrics(folder, lambda _: None, is_running=True)
        return [row for row in rows if any(key.startswith("eval/") for key in row)]
    return []


def summary(found: dict[str, Any]) -> str:
    """Writes what was found as Markdown."""
    about = found["machine"]
    peak = about["product_flops"]
    lines = [
        f"{about['device']}, torch {about['torch']}, {about['cpus']} CPUs, bfloat16 product {peak / 1e12:.3g} Tflop/s"
    ]
    lines += ["", f"Tests marked `gpu`: {found.get('tests', 'not run to the end')}"]
    if rows := found.get("speed"):
        lines += ["", "| a step of | seconds | tokens a second | share of the product | peak GB | compiled |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
    for recipe, row in found.get("speed", {}).items():
        gigabytes = row.get("peak_device_bytes", row["peak_rss_bytes"]) / 1e9
        rate = f"{row['tokens_per_second']:,.0f} | {row['flops'] / peak:.1%}"
        lines.append(f"| {recipe} | {row['seconds_per_step']:.4g} | {rate} | {gigabytes:.2f} | {row['compiled']} |")
    for name, row in found.get("reference", {}).items():
        for pair, ratio in row["ratios"].items():
            lines += ["", f"{name}: {pair}: time {ratio['seconds'][0]:.2f}, peak memory {ratio['peak_bytes'][0]:.2f}"]
    for recipe, rows in found.get("training", {}).items():
        measures = sorted({key for row in rows for key in row if key.startswith(("eval/nelbo/", "eval/accuracy/"))})
        lines += ["", f"| {recipe}: step | seconds | examples | {' | '.join(measures)} |"]
        lines += ["| --- " * (3 + len(measures)) + "|"]
        for row in rows:
            values = " | ".join(f"{row[key]:.4g}" if row.get(key) is not None else "" for key in measures)
            lines.append(f"| {row['step']} | {row['seconds']:.0f} | {row['examples_seen']} | {values} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
