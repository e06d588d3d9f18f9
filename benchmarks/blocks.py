"""Block diffusion in one pass over `[xt ; x0]`, beside a pass for every block, and beside plain diffusion.

    OMP_NUM_THREADS=2 python benchmarks/blocks.py [--blocks 2 8 16] [--dtype bfloat16] [--compile] ...

Times forward and backward passes of the denoiser, in rounds that run all three after each other. `prefixes` is what a
model without two streams must do: the pass of block b reads the blocks up to it, (b + 1) S positions, with every one of
them bidirectional. Prints one JSON object a number of blocks: medians of seconds, and of the ratios of a round.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from unmask.masking.process import masked_batch
from unmask.models.build import build_denoiser
from unmask.models.denoiser import Denoiser
from unmask.models.transformer_config import TransformerConfig
from unmask.types import MaskedBatch, TokenSpec


def build(arguments: argparse.Namespace, block_size: int | None) -> Denoiser:
    settings = {"preset": arguments.preset, "block_size": block_size}
    tokens = TokenSpec(vocab_size=arguments.vocabulary, length=arguments.length, mask_id=arguments.vocabulary - 1)
    model = build_denoiser(TransformerConfig(**settings), tokens, dtype=arguments.dtype)
    if arguments.compile:
        model.compile_training()
    return model


def masked(arguments: argparse.Namespace) -> MaskedBatch:
    """Half of all tokens."""
    shape, mask_id = (arguments.rows, arguments.length), arguments.vocabulary - 1
    x0 = torch.randint(mask_id, shape)
    return masked_batch(x0, torch.where(torch.rand(shape) < 0.5, mask_id, x0), mask_id, torch.ones(arguments.rows))


def prefixes(batch: MaskedBatch, size: int, mask_id: int) -> list[MaskedBatch]:
    """The batch of every block: the clean ones before it, and itself."""
    made = []
    for start in range(0, batch.x0.shape[1], size):
        end = start + size
        xt = torch.cat([batch.x0[:, :start], batch.xt[:, start:end]], dim=1)
        made.append(masked_batch(batch.x0[:, :end], xt, mask_id, torch.ones(len(xt))))
    return made


def step(model: Denoiser, batches: list[MaskedBatch]) -> Callable[[], None]:
    def run() -> None:
        for batch in batches:
            stats = model(batch)
            (stats.nll * batch.weight).sum().backward()
        model.zero_grad()

    return run


def seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def compare(arguments: argparse.Namespace, num_blocks: int) -> dict[str, float]:
    size, batch = arguments.length // num_blocks, masked(arguments)
    plain = build(arguments, None)
    runs = {
        "one_pass": step(build(arguments, size), [batch]),
        "prefixes": step(plain, prefixes(batch, size, arguments.vocabulary - 1)),
        "plain": step(plain, [batch]),
    }
    for run in runs.values():
        run()  # warms up
    rounds = [{name: seconds(run) for name, run in runs.items()} for _ in range(arguments.rounds)]
    return {name: statistics.median(times[name] for times in rounds) for name in runs} | {
        "prefixes_by_one_pass": statistics.median(times["prefixes"] / times["one_pass"] for times in rounds),
        "one_pass_by_plain": statistics.median(times["one_pass"] / times["plain"] for times in rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 8, 16])
    parser.add_argument("--preset", default="sudoku-6m")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true")
    for name, value in {"rows": 16, "length": 256, "vocabulary": 512, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for num_blocks in arguments.blocks:
        print(json.dumps({"blocks": num_blocks, "dtype": arguments.dtype} | compare(arguments, num_blocks)), flush=True)


if __name__ == "__main__":
    main()
