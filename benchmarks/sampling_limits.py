"""What `top_k` and `top_p` cost with a vocabulary of 151,646: seconds of CPU time beside drawing without limits.

    python -m benchmarks.sampling_limits --std 0.1 1 4

A network of one layer decodes two rows of 16 positions in one step. `--std`: of the logits; at 0.1, as of a model that
is not trained yet, nearly all tokens are as likely; at 4 a few have most of the probability, as of a trained one.
"""

import argparse
import time
from typing import Any

import torch

from unmask.decoding.decoder import Decoder
from unmask.decoding.sampling import Sampling
from unmask.models.denoiser import Denoiser
from unmask.models.transformer import Transformer
from unmask.models.transformer_config import TransformerConfig
from unmask.reveal import Fixed
from unmask.types import TokenSpec

VOCABULARY, LENGTH, WIDTH = 151_646, 16, 64
LIMITS: list[dict[str, Any]] = [
    {},
    {"top_k": 50},
    {"top_k": 1000},
    {"top_k": 100_000},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 0.99},
    {"top_k": 50, "top_p": 0.9},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--std", type=float, nargs="+", default=[0.1, 1.0, 4.0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens = TokenSpec(vocab_size=VOCABULARY, length=LENGTH, mask_id=VOCABULARY - 1)
    network = Transformer(TransformerConfig(dim=WIDTH, ff_dim=2 * WIDTH, num_layers=1, num_heads=4), tokens)
    model = Denoiser(network, mask_id=tokens.mask_id).eval()
    canvases = torch.full((2, LENGTH), tokens.mask_id)
    for std in options.std:
        with torch.no_grad():
            model.backbone.head_weight.normal_(std=std / WIDTH**0.5)
        best = [float("inf")] * len(LIMITS)
        for _ in range(options.rounds):  # in turn, so that a busy machine slows all of them
            for i, limits in enumerate(LIMITS):
                decoder = Decoder(model.predict, tokens.mask_id, rule=Fixed(LENGTH), sampling=Sampling(1.0, **limits))
                started = time.process_time()
                decoder.decode(canvases)
                best[i] = min(best[i], time.process_time() - started)
        for limits, seconds in zip(LIMITS, best, strict=True):
            print(f"std {std:g}  {limits or 'none'}: {seconds:.2f} s, {seconds / best[0]:.2f} times none")


if __name__ == "__main__":
    main()
