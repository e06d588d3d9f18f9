"""Quality against forward passes and seconds, for many decoders of one trained model.

    python benchmarks/decoding.py RUN --out FILE.jsonl [--examples 200] [--rounds 3] [--judge RUN] [DECODER ...]
    python benchmarks/decoding.py --table FILE.jsonl ... [--page FIGURE.html]

Each DECODER is what `--decoder` of `unmask eval` takes; unless given, those of `GRID`. All decode the same held-out
examples, in turns, round by round; seconds are the median over rounds. A judge, an autoregressive run of the same
vocabulary, says how likely the answers are: quality where few are right.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import figures
import torch

from unmask.cli.options import parse_decoder
from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig
from unmask.lab.report.chart import Chart, Line
from unmask.masking.process import make_batch
from unmask.models.denoiser import Denoiser
from unmask.tasks.task import GradedTask
from unmask.training.loading import LoadedRun, load
from unmask.types import CleanBatch

GRID = [
    *(f"prob,tokens_per_step={n}" for n in (1, 2, 3, 5, 8, 12, 20)),
    *(f"prob,steps={n},schedule=cosine" for n in (8, 16, 32)),
    *(f"{order},threshold={tau}" for order in ("prob", "margin") for tau in (0.99, 0.95, 0.9, 0.8, 0.6, 0.4)),
    *(f"prob,factor={factor}" for factor in (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)),
    *(f"neg_entropy,entropy_bound={gamma}" for gamma in (0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)),
    "random,tokens_per_step=1",
    "random,tokens_per_step=3",
    "margin,tokens_per_step=1",
    "neg_entropy,tokens_per_step=1",
    *(f"prob,steps={n},remask=p2" for n in (16, 32, 64)),
    *(f"prob,steps={n},remask=remdm_{kind}" for n in (32, 64) for kind in ("rescale,remask_eta=0.1", "confidence")),
]


def measure(
    run: str, decoders: list[str], *, examples: int, rounds: int, judge: str | None, threads: int
) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    source = LoadedRun.open(run)
    task, model = source.task, source.model.float()
    if not isinstance(task, GradedTask):
        raise SystemExit(f"{run}: task {source.config.task.name} has no right answers")
    held_out = task.validation(examples)
    critic = load(judge).float() if judge else None
    configs = [parse_decoder(text, source.config.decode) for text in decoders]
    results: list[dict[str, Any]] = [
        {"run": run, "decoder": text, "label": config.label} for text, config in zip(decoders, configs, strict=True)
    ]
    seconds: list[list[float]] = [[] for _ in configs]
    for number in range(rounds):
        for config, result, own in zip(configs, results, seconds, strict=True):
            tokens, nfe, taken = decode(model, config, held_out, task.tokens)
            own.append(taken)
            if number == 0:
                grades = task.grade(held_out, tokens)
                result |= {name: value.double().mean().item() for name, value in grades.measures.items()}
                result |= {"n": len(held_out), "nfe": nfe, **likelihood(critic, held_out, tokens, task.tokens.eos_id)}
                print(json.dumps(result | {"seconds": taken}), flush=True)
    return [result | {"seconds": statistics.median(own)} for result, own in zip(results, seconds, strict=True)]


def decode(
    model: Denoiser, config: DecodeConfig, held_out: CleanBatch, tokens: Any
) -> tuple[torch.Tensor, float, float]:
    decoder = build_decoder(config, model, tokens)
    xt = held_out.masked(tokens.mask_id)
    started = time.perf_counter()
    decoded = decoder.decode(xt)
    return decoded.tokens, decoded.nfe.double().mean().item(), time.perf_counter() - started


@torch.no_grad()
def likelihood(
    critic: Denoiser | None, held_out: CleanBatch, tokens: torch.Tensor, eos_id: int | None
) -> dict[str, float]:
    """Nats per token of the answers under `critic`, and how varied they are: low values of both are repetition."""
    if critic is None:
        return {}
    answers = CleanBatch(x0=tokens, prompt_mask=held_out.prompt_mask)
    is_scored = answers.answer_mask(eos_id)
    total = 0.0
    for rows in torch.arange(len(tokens)).split(32):
        batch = make_batch(tokens[rows], tokens[rows], is_scored[rows], torch.ones(tokens[rows].shape))
        total += float((critic(batch).nll * batch.weight).sum())
    triples = [triple for row, own in zip(tokens, is_scored, strict=True) for triple in _triples(row[own].tolist())]
    counts = torch.tensor(list(Counter(tokens[is_scored].tolist()).values())).double()
    return {
        "judge_nll": total / int(is_scored.sum()),
        "answer_tokens": float(is_scored.sum() / len(tokens)),
        "distinct_3": len(set(triples)) / max(1, len(triples)),
        "unigram_entropy": torch.special.entr(counts / counts.sum()).sum().item(),
    }


def _triples(ids: list[int]) -> list[tuple[int, ...]]:
    return list(zip(ids, ids[1:], ids[2:], strict=False))


def table(rows: list[dict[str, Any]]) -> None:
    """By run, in order of NFE. On the front: no other is as good with fewer passes (`front`) or seconds (`quick`)."""
    measures = [
        key for key in ("accuracy", "runs", "parses", "judge_nll", "distinct_3", "unigram_entropy") if key in rows[0]
    ]
    head = ["decoder", *measures, "NFE", "seconds", "front"]
    for run in dict.fromkeys(row["run"] for row in rows):
        own = sorted((row for row in rows if row["run"] == run), key=lambda row: row["nfe"])
        print(f"\n{run}, {own[0]['n']} examples\n\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
        for row in own:
            marks = " ".join(
                name for name, key in (("NFE", "nfe"), ("seconds", "seconds")) if is_on_front(row, own, key)
            )
            values = [f"{row[key]:.3f}" for key in measures]
            print(
                "| " + " | ".join([row["decoder"], *values, f"{row['nfe']:.1f}", f"{row['seconds']:.2f}", marks]) + " |"
            )


def is_on_front(row: dict[str, Any], rows: list[dict[str, Any]], cost: str) -> bool:
    def quality(each: dict[str, Any]) -> float:
        return -each["judge_nll"] if "judge_nll" in row else each["accuracy"]

    return not any(
        quality(other) >= quality(row)
        and other[cost] <= row[cost]
        and (quality(other), other[cost]) != (quality(row), row[cost])
        for other in rows
    )


FAMILIES = ("threshold", "factor", "entropy_bound", "remask", "schedule", "tokens_per_step")


def page(rows: list[dict[str, Any]]) -> str:
    """Quality against passes and against seconds, a line for each kind of rule, as one HTML page."""
    charts = []
    for run in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == run and not row["decoder"].startswith("random")]
        kinds = {name: [row for row in own if family(row) == name] for name in FAMILIES}
        for cost, label in (("nfe", "forward passes"), ("seconds", "seconds")):
            lines = [
                Line(name, style, sorted((row[cost], row["accuracy"]) for row in found))
                for style, (name, found) in enumerate(kinds.items())
                if found
            ]
            title = f"{Path(run).name}: right against {label}"
            charts.append(Chart(title, label, "right", lines, is_share=True))
    return figures.page(charts, FAMILIES)


def family(row: dict[str, Any]) -> str:
    return next((name for name in FAMILIES if name in row["decoder"]), "tokens_per_step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?")
    parser.add_argument("decoders", nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, nargs="+")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--judge")
    asked = parser.parse_intermixed_args()
    if asked.table:
        rows = [json.loads(line) for path in asked.table for line in path.read_text().splitlines()]
        table(rows)
        if asked.page is not None:
            asked.page.write_text(page(rows))
        return
    if asked.run is None or asked.out is None or asked.out.exists():
        parser.error("give a RUN, and as --out a file that is not there yet")
    results = measure(
        asked.run,
        asked.decoders or GRID,
        examples=asked.examples,
        rounds=asked.rounds,
        judge=asked.judge,
        threads=asked.threads,
    )
    asked.out.write_text("".join(json.dumps(result) + "\n" for result in results))
    table(results)


if __name__ == "__main__":
    main()
