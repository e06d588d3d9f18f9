"""PUMA's reference implementation and unmask in turn, at the same sizes: a training step, and decoding.

    git clone https://github.com/JaeyeonKim01/PUMA
    python benchmarks/against_reference.py --reference PUMA [--only sudoku-step tinygsm] [--rounds 3] [--json FILE]

Rows: sudoku-step, tinygsm-step; decode-same and sudoku-decode-same, where both decode with the reference's module and
must agree on every token; decode-own and sudoku-decode-own, each with its own model. Every measurement has a process of
its own, so that its peak memory is its own, and the two systems take turns, so that a machine that slows down slows
both. On a CPU the reference runs in fp32, as its autocast is for CUDA alone; "with autocast" puts one around it.

Random weights and tokens. The reference is imported from its folder and is not part of this repository. Exit codes:
0 done, 1 failed or the tokens differ, 2 a wrong argument or folder.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from reference_jobs import DEVICE, Request, Result, Wrong, sizes

FILES = ("progressive.py", "sampling.py", "model/transformer.py", "model/ema.py")
SUDOKU, TINYGSM = "yaml_files/sudoku_puma.yaml", "yaml_files/tinygsm_puma.yaml"
IN_FP32, IN_BF16 = ["train.dtype=float32"], ["train.dtype=bfloat16"]


@dataclass(frozen=True)
class Row:
    """Something to measure. `ours` holds settings over the recipe's by label; `alone` too, for peak memory only."""

    kind: str
    config: str
    recipe: str
    batch: int
    masked: int
    tokens: int = 1
    steps: int = 20
    warm_up: int = 3
    prompt_key: str | None = None
    ours: dict[str, list[str]] = field(default_factory=dict)
    alone: dict[str, list[str]] = field(default_factory=dict)


GSM = Row("step", TINYGSM, "tinygsm/puma", batch=4, masked=412, steps=3, warm_up=1, prompt_key="data.prompt_length")
OWN = {
    f"ours, {name}, compiled": [f"decode.dtype={dtype}", "decode.compile=true"]
    for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
}
ROWS = {
    "sudoku-step": Row(
        "step", SUDOKU, "sudoku/paper_puma", batch=32, masked=81, ours={"ours, bf16": IN_BF16, "ours, fp32": IN_FP32}
    ),
    "tinygsm-step": replace(
        GSM,
        ours={"ours, bf16": IN_BF16},
        alone={
            "ours, fp32": IN_FP32,
            "ours, bf16, no EMA": [*IN_BF16, "ema.decay=0"],
            "ours, bf16, B 32, checkpointing": [*IN_BF16, "train.batch_size=32", "model.checkpointing=true"],
        },
    ),
    "decode-same": replace(GSM, kind="same", batch=8, masked=256, tokens=2),
    "decode-own": replace(GSM, kind="own", batch=8, masked=256, tokens=2, ours=OWN),
    "sudoku-decode-same": Row("same", SUDOKU, "sudoku/paper_puma", batch=32, masked=81, tokens=3),
    "sudoku-decode-own": Row("own", SUDOKU, "sudoku/paper_puma", batch=32, masked=81, tokens=3, ours=OWN),
}


class Failed(Exception):
    """A measurement that ended without a result."""


# Taking turns


def run_worker(request: Request, device: str) -> Result:
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}
    command = [sys.executable, str(Path(__file__).with_name("reference_jobs.py")), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode == 2:
        raise Wrong(done.stderr.strip())
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise Failed(f"{request['job']}: ended with {done.returncode} (-9: no memory left, as a rule). {last}")
    return json.loads(done.stdout.splitlines()[-1])


def requests(row: Row, arguments: argparse.Namespace) -> dict[str, Request]:
    """What is measured in a round, by label."""
    options = {key: getattr(arguments, key) for key in ("reference", "reference_steps", "levels", "threads")}
    shared = {**asdict(row), **options, "settings": sizes(arguments.reference, row.config)}
    variants = ["float32"] if row.kind == "same" else ["as it runs", "with autocast"]
    if arguments.device == "cuda":
        variants = variants[:1]  # as it runs, it has autocast
    job = "reference-step" if row.kind == "step" else "reference-decode"
    asked = {f"reference, {name}": {**shared, "job": job, "precision": name} for name in variants}
    if row.kind == "same":
        for label, is_plain in {"ours, head where asked": False, "ours, any callable": True}.items():
            asked[label] = {**shared, "job": "module-decode", "plain": is_plain, "precision": "float32"}
    alone = {} if arguments.without_alone else row.alone
    for label, settings in (row.ours | alone).items():
        command = bench_arguments(row, shared["settings"], 1 if label in row.alone else row.steps)
        asked[label] = {**shared, "job": "bench", "arguments": [*command, *settings, *arguments.ours]}
    return asked


def bench_arguments(row: Row, settings: dict[str, Any], count: int) -> list[str]:
    prompt_length = settings["model"]["max_position"] - row.masked
    prompt = [f"{row.prompt_key}={prompt_length}"] if row.prompt_key else []
    if row.kind == "step":
        return ["step", row.recipe, "--count", str(count), f"train.batch_size={row.batch}", *prompt]
    return ["decode", row.recipe, "--rows", str(row.batch), f"decode.tokens_per_step={row.tokens}", *prompt]


def measure(name: str, row: Row, arguments: argparse.Namespace) -> dict[str, list[Result]]:
    asked = requests(row, arguments)
    results: dict[str, list[Result]] = {label: [] for label in asked}
    for number in range(arguments.rounds):
        for label, request in asked.items():
            if number and label in row.alone:
                continue
            print(f"{name}, round {number + 1} of {arguments.rounds}: {label}", file=sys.stderr)
            try:
                results[label].append(run_worker(request, arguments.device))
            except Failed as error:
                if label not in row.alone:
                    raise
                print(f"{name}: left out, {label}: {error}", file=sys.stderr)
                del results[label]
    return results


def agreement(results: dict[str, list[Result]]) -> dict[str, float]:
    """The share of tokens that are the reference's, of each of ours."""
    expected = next(iter(results.values()))[0]["tokens"]
    return {
        label: statistics.mean(a == b for each in found for a, b in zip(each["tokens"], expected, strict=True))
        for label, found in results.items()
        if label.startswith("ours")
    }


def ratios(results: dict[str, list[Result]], row: Row) -> dict[str, dict[str, list[float]]]:
    """The reference over ours, round by round: above 1, ours needs less."""
    found = {}
    for label, theirs in results.items():
        for other, ours in results.items():
            if label.startswith("reference") and other.startswith("ours") and other not in row.alone:
                pairs = list(zip(theirs, ours, strict=True))
                found[f"{label} / {other}"] = {k: [a[k] / b[k] for a, b in pairs] for k in ("seconds", "peak_bytes")}
    return found


def print_row(name: str, row: Row, results: dict[str, list[Result]], arguments: argparse.Namespace) -> None:
    print(f"\n{name}: B {row.batch}, {row.masked} positions of a row maskable; {row.config} against {row.recipe}")
    if row.kind != "step":
        print(
            f"greedy by prob, {row.tokens} a step; reference: timed over {arguments.reference_steps} steps and scaled"
        )
    if row.kind == "same":
        print(
            f"ours: timed at {arguments.levels} fill levels and scaled" if arguments.levels else "ours: timed in full"
        )
    print(f"{'':<30} {'dtype':<9} {'parameters':>11} {'seconds: median (range)':>32} {'peak GB':>9}")
    for label, found in results.items():
        seconds = [each["seconds"] for each in found]
        spread = f"{statistics.median(seconds):.4g} ({min(seconds):.4g} to {max(seconds):.4g})"
        peak = max(each["peak_bytes"] for each in found) / 1e9
        parameters = found[0].get("parameters", "")
        print(f"{label:<30} {found[0]['dtype']:<9} {parameters:>11} {spread:>32} {peak:>9.2f}")
    print(f"{'reference over ours: min median max':<54} {'time':>18} {'peak memory':>18}")
    for label, ratio in ratios(results, row).items():
        print(f"{label:<54} {three(ratio['seconds']):>18} {three(ratio['peak_bytes']):>18}")


def three(values: list[float]) -> str:
    return f"{min(values):.2f} {statistics.median(values):.2f} {max(values):.2f}"


OPTIONS: dict[str, dict[str, Any]] = {
    "reference": {"required": True, "metavar": "DIR", "help": "the reference implementation"},
    "only": {"nargs": "+", "default": [""], "metavar": "ROW", "help": "rows, or what their names start with"},
    "rounds": {"type": int, "default": 3},
    "device": {"choices": ("auto", "cpu", "cuda"), "default": "auto"},
    "threads": {"type": int, "help": "CPU threads; PyTorch's choice, unless given"},
    "json": {"type": Path, "metavar": "FILE", "help": "also write all measurements there"},
    "steps": {"type": int, "help": "training steps to measure, or batch, masked, tokens: the row's, unless given"},
    "batch": {"type": int, "help": "rows"},
    "masked": {"type": int, "help": "maskable positions of a row"},
    "tokens": {"type": int, "help": "revealed in a step of decoding"},
    "reference-steps": {"type": int, "default": 6, "help": "decoding steps to time the reference over, and to compare"},
    "levels": {"type": int, "default": 4, "help": "fill levels at which decode-same times ours; 0: in full"},
    "ours": {"nargs": "+", "default": [], "metavar": "key=value", "help": "more settings for unmask bench"},
    "without-alone": {"action": "store_true", "help": "leave out what is measured for its peak memory alone"},
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, option in OPTIONS.items():
        parser.add_argument(f"--{name}", **option)
    arguments = parser.parse_args(argv)
    for name, value in vars(arguments).items():
        if type(value) is int and value < (name != "levels"):
            raise Wrong(f"--{name.replace('_', '-')} {value}: too small")
    if wrong := [start for start in arguments.only if not any(name.startswith(start) for name in ROWS)]:
        raise Wrong(f"--only {' '.join(wrong)}: no such row; there are {', '.join(ROWS)}")
    return arguments


def check(arguments: argparse.Namespace) -> None:
    """Settles what is left open, and looks for what the workers will need."""
    folder = Path(arguments.reference).resolve()
    if missing := [name for name in (*FILES, SUDOKU, TINYGSM) if not (folder / name).is_file()]:
        raise Wrong(f"--reference {folder}: has no {', '.join(missing)}; give a clone of JaeyeonKim01/PUMA")
    if arguments.device == "cuda" and DEVICE.type == "cpu":
        raise Wrong("--device cuda: there is none")
    arguments.reference = str(folder)
    arguments.device = DEVICE.type if arguments.device == "auto" else arguments.device


def chosen(arguments: argparse.Namespace) -> dict[str, Row]:
    given = {key: getattr(arguments, key) for key in ("steps", "batch", "masked", "tokens") if getattr(arguments, key)}
    starts = tuple(arguments.only)
    rows = {name: replace(row, **given) for name, row in ROWS.items() if name.startswith(starts)}
    for name, row in rows.items():
        length = sizes(arguments.reference, row.config)["model"]["max_position"]
        if row.masked > length:
            raise Wrong(f"--masked {row.masked}: {name} has {length} positions")
    return rows


def compare(arguments: argparse.Namespace) -> None:
    check(arguments)
    rows = chosen(arguments)
    computer = run_worker({"job": "machine", "threads": arguments.threads}, arguments.device)
    print(", ".join(f"{key} {computer[key]}" for key in computer if key != "peak_bytes"))
    report, differing = {"machine": computer, "rows": {}}, []
    for name, row in rows.items():
        results = measure(name, row, arguments)
        print_row(name, row, results, arguments)
        report["rows"][name] = {"measurements": results, "ratios": ratios(results, row)}
        for label, share in (agreement(results) if row.kind == "same" else {}).items():
            print(f"{label}: {share:.2%} of the tokens are the reference's")
            differing += [f"{name}, {label}"] if share < 1 else []
        if arguments.json:  # after every row, as the next may take an hour
            arguments.json.write_text(json.dumps(report, indent=1))
    if differing:
        raise Failed(f"tokens differ from the reference's: {'; '.join(differing)}")


def main(argv: list[str] | None = None) -> int:
    try:
        compare(parse(argv))
    except (Wrong, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, Wrong) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
