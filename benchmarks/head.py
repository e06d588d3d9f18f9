"""The output head of a large vocabulary: `models/head.py` beside the plain one and PyTorch's own, at TinyGSM's sizes.

    OMP_NUM_THREADS=1 python benchmarks/head.py {fused,plain,torch} [--confidence margin] [--vocabulary 8192] ...

One head a process, so that its peak memory is its own. Prints one JSON object: CPU seconds, the least of the rounds.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.lab.bench import peak_rss_bytes
from unmask.models.head import CHUNK, token_stats
from unmask.types import TokenStats, at_least_fp32


def heads(arguments: argparse.Namespace, weight: Tensor, x0: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """From hidden states to NLLs. PyTorch's knows no confidence."""
    mask_id, confidence = len(weight) - 1, arguments.confidence

    def fused(hidden: Tensor) -> Tensor:
        return token_stats(hidden, weight, x0, mask_id=mask_id, confidence=confidence, chunk=arguments.chunk).nll

    def plain(hidden: Tensor) -> Tensor:
        is_mask_token = torch.arange(len(weight)) == mask_id
        logits = at_least_fp32(F.linear(hidden, weight)).masked_fill(is_mask_token, -torch.inf)
        return TokenStats.from_logits(logits, x0, confidence=confidence).nll

    def of_torch(hidden: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), x0, reduction="none")

    return {"fused": fused, "plain": plain, "torch": of_torch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("head", choices=("fused", "plain", "torch"))
    parser.add_argument("--confidence", default="prob", choices=("prob", "margin", "neg_entropy"))
    parser.add_argument("--chunk", type=int, default=CHUNK)
    for name, value in {"vocabulary": 151_645, "positions": 824, "dim": 768, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    weight = (torch.randn(arguments.vocabulary, arguments.dim) * arguments.dim**-0.5).requires_grad_()
    x0 = torch.randint(arguments.vocabulary - 1, (arguments.positions,))
    run = heads(arguments, weight, x0)[arguments.head]
    forward, backward = [], []
    for _ in range(arguments.rounds):
        weight.grad = None
        hidden = torch.randn(arguments.positions, arguments.dim, requires_grad=True)
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(hidden).mean()
        between = time.process_time()
        loss.backward()
        forward.append(between - started)
        backward.append(time.process_time() - between)
    seconds = {"forward_seconds": min(forward), "backward_seconds": min(backward)}
    print(json.dumps(vars(arguments) | seconds | {"peak_rss_bytes": peak_rss_bytes()}))


if __name__ == "__main__":
    main()
