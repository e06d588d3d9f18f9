"""Times the likelihood of continuations against a loop that copies each request, in turn, at equal standard error.

    python benchmarks/loglikelihood.py runs/mine --text questions.jsonl

The loop is how LLaDA's evaluation and its kin do it: `--draws` copies of a request, n masked positions of the
continuation each, n spread evenly over 1 .. L with a random offset, logits of all positions, and the mean of
L / n x NLL. Ours is `score_pairs`. Requests are the first tokens of the lines of a file, half of them given. Both draw
different masks in every round, so the variance over rounds is that of the estimate, whatever either says of itself.

    python benchmarks/loglikelihood.py runs/mine --questions questions.jsonl --draws 32

counts the forward rows that multiple choice takes: one for each draw, as the loop; all masks once where they are no
more than the draws; and (ours) each different mask once as well. The model is not run.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from unmask.evaluation.choices import PairEncoder, QuestionSet
from unmask.evaluation.continuations import Pair, plan_rows, score_pairs
from unmask.models.denoiser import Denoiser
from unmask.training.loading import LoadedRun

COPIES = 32
"""Rows of one forward pass of the loop."""


@torch.no_grad()
def copied(model: Denoiser, pair: Pair, draws: int, generator: torch.Generator) -> float:
    """Estimates log p(continuation | context) in nats."""
    length, start = len(pair.continuation), len(pair.context)
    x0 = torch.tensor([*pair.context, *pair.continuation])
    total = 0.0
    for _ in range(draws // COPIES):
        offset = torch.randint(length, (), generator=generator)
        count = (offset + torch.linspace(1, 1 + (COPIES - 1) * length / COPIES, COPIES)).round().long() - 1
        count = count % length + 1
        rank = torch.rand(COPIES, length, generator=generator).argsort(-1).argsort(-1)
        masked = F.pad(rank < count[:, None], (start, 0))
        rows = x0.expand(COPIES, -1)
        logits = model.logits(rows.masked_fill(masked, model.mask_id), torch.arange(rows.numel()))  # of all positions
        nll = F.cross_entropy(logits[masked.flatten()], rows[masked], reduction="none")
        total += float((nll * (length / count).repeat_interleave(count)).sum()) / draws
    return -total


def read_pairs(run: LoadedRun, file: Path, number: int, context: int, continuation: int) -> list[Pair]:
    """Reads the first lines that are long enough, each a JSON object whose strings are its text."""
    found: list[Pair] = []
    for line in file.read_text().splitlines():
        text = "\n".join(value for value in json.loads(line).values() if isinstance(value, str))
        ids = PairEncoder.of(run.task).vocabulary.encode(text)
        if len(ids) >= context + continuation:
            found.append(Pair(tuple(ids[:context]), tuple(ids[context : context + continuation]), len(found)))
        if len(found) == number:
            break
    return found


def count_rows(run: LoadedRun, file: Path, draws: int) -> dict[str, float]:
    """Counts the rows of all choices of a file."""
    asked = QuestionSet.read(file, run.task, run.model, name=file.name, draws=draws)
    plans = [plan_rows(run.model, pair, 0, asked.length, draws, 0) for pairs in asked.encoded for pair in pairs]
    exact = [len(plan.weight) for plan in plans if plan.drawn is None]
    return {
        "choices": len(plans),
        "of which exact": len(exact),
        "a row for each draw": draws * len(plans),
        "all masks where few": draws * (len(plans) - len(exact)) + sum(exact),
        "each mask once": sum(len(plan.weight) for plan in plans),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run, an export or a checkpoint of a masked model with text")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", type=Path, help="JSON lines")
    what.add_argument("--questions", type=Path, help="JSON lines, as for `unmask eval --task multiple_choice`")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--continuation", type=int, default=32)
    parser.add_argument("--draws", type=int, default=32, help=f"masks of a request, a multiple of {COPIES}")
    parser.add_argument("--rounds", type=int, default=8, help="each with masks of its own")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    given = parser.parse_args()
    run = LoadedRun.open(given.run, device="cpu")
    if given.questions is not None:
        print(json.dumps(count_rows(run, given.questions, given.draws)))
        return
    model = run.model.use_dtype(given.dtype).eval()
    pairs = read_pairs(run, given.text, given.requests, given.context, given.continuation)
    length = given.context + given.continuation
    values: dict[str, list[list[float]]] = {"copies": [], "unmask": []}
    seconds: dict[str, list[float]] = {"copies": [], "unmask": []}
    errors: list[float] = []
    for number in range(given.rounds):
        generator = torch.Generator().manual_seed(number)
        started = time.perf_counter()
        values["copies"].append([copied(model, pair, given.draws, generator) for pair in pairs])
        middle = time.perf_counter()
        scores = score_pairs(model, pairs, length=length, draws=given.draws, seed=number)
        values["unmask"].append([score.value for score in scores])
        errors += [score.stderr or 0.0 for score in scores]
        seconds["copies"].append(middle - started)
        seconds["unmask"].append(time.perf_counter() - middle)
    faster = statistics.median(a / b for a, b in zip(seconds["copies"], seconds["unmask"], strict=True))
    spread = {name: torch.tensor(found).var(dim=0).mean().item() for name, found in values.items()}
    stated = statistics.mean(error**2 for error in errors)
    means = {name: torch.tensor(found).mean().item() for name, found in values.items()}
    print(json.dumps({"requests": len(pairs), "seconds": {k: statistics.median(v) for k, v in seconds.items()}}))
    print(json.dumps({"mean": means, "variance_of_a_score": spread, "square_of_the_stated_error": stated}))
    equal = faster * spread["copies"] / spread["unmask"]
    print(f"at equal draws {faster:.2f} times as fast; at equal variance {equal:.2f} times")


if __name__ == "__main__":
    main()
