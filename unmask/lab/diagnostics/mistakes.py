"""Finds where decoding first goes wrong: how much was still masked when the first wrong token was revealed.

One wrong token spoils what is built on it, so later ones say little. Where most first mistakes are made at, say, 60 to
80 % masked, a density of training times with its mass there (`process.time`) trains what decoding lacks.

Dimensions: R examples, L positions, K bins.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig
from unmask.lab.diagnostics.measures import NotApplicable, bin_index
from unmask.models.precision import casts_kept
from unmask.tasks.task import GradedTask
from unmask.training.loading import LoadedRun
from unmask.types import CleanBatch

NUM_BINS = 8
BATCH = 64
"""Most examples that are decoded at once."""


@dataclass(frozen=True)
class MistakeBin:
    """The decoding steps that began with a share in (low, high] of an answer masked, and nothing wrong revealed yet."""

    low: float
    high: float
    steps: int
    mistakes: int
    """Those of them that revealed something wrong: the first mistakes of their examples."""


@dataclass(frozen=True)
class FirstMistakes:
    """The first mistakes of a decoder, by how much was masked; `wrong` of the examples have one."""

    decoder: str
    examples: int
    wrong: int
    bins: list[MistakeBin]


def measure_mistakes(
    run: LoadedRun, examples: CleanBatch, decoder: DecodeConfig, *, on_progress: Callable[[float], None]
) -> FirstMistakes:
    """Decodes held-out examples, and compares what each step reveals with their own tokens.

    Raises:
        NotApplicable: the model is causal, or no token is known to be wrong.
    """
    trainer, mask_id = run.trainer(), run.tokens.mask_id
    if trainer.model.is_causal:
        raise NotApplicable("a causal model decodes left to right, whatever is masked")
    if not (isinstance(run.task, GradedTask) and examples.is_known(mask_id)):
        raise NotApplicable("the held-out examples have no right answers that are known as tokens")
    size = min(BATCH, decoder.batch_size, len(examples))
    counts = torch.zeros(2, NUM_BINS, dtype=torch.long)

    def canvases(start: int, own: CleanBatch) -> Iterator[Int[Tensor, "R L"]]:
        key = torch.arange(start, start + len(own), device=trainer.device)
        for step in decode.steps(own.masked(mask_id).to(trainer.device), key):
            yield step.tokens
            on_progress((start + len(own) * (step.tokens != mask_id).float().mean().item()) / len(examples))

    with trainer.weights(run.weights), casts_kept():
        decode = build_decoder(decoder, trainer.model, run.tokens, rows=size)
        for start in range(0, len(examples), size):
            own = examples[start : start + size]
            counts += count_first_mistakes(canvases(start, own), own, mask_id)
    num_steps, mistakes = counts.tolist()
    bins = [
        MistakeBin(k / NUM_BINS, (k + 1) / NUM_BINS, num_steps[k], mistakes[k]) for k in range(NUM_BINS) if num_steps[k]
    ]
    return FirstMistakes(decoder.label, len(examples), sum(mistakes), bins)


def count_first_mistakes(
    canvases: Iterable[Int[Tensor, "R L"]], examples: CleanBatch, mask_id: int
) -> Int[Tensor, "2 K"]:
    """Counts, by the share masked before it, the steps up to each example's first mistake, and the first mistakes.

    Args:
        canvases: the rows before the first step and after each one.
    """
    counts = torch.zeros(2, NUM_BINS, dtype=torch.long)
    num_asked, is_right = (~examples.prompt_mask).sum(dim=1), torch.ones(len(examples), dtype=torch.bool)
    before = examples.masked(mask_id)
    for canvas in canvases:
        after = canvas.cpu()
        is_new = (before == mask_id) & (after != mask_id)
        is_wrong = (is_new & (after != examples.x0)).any(dim=1)
        is_counted = is_right & is_new.any(dim=1)
        k = bin_index((before == mask_id).sum(dim=1), num_asked, NUM_BINS)
        for row, those in enumerate((is_counted, is_counted & is_wrong)):
            counts[row] += torch.bincount(k[those], minlength=NUM_BINS)
        is_right, before = is_right & ~is_wrong, after.clone()  # the decoder goes on in the same tensor
    return counts
