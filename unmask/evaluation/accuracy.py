"""The share of examples that a decoder gets right."""

import math
from dataclasses import dataclass

import torch

from unmask.config import DecodeConfig
from unmask.decoding.build import build_decoder
from unmask.models.denoiser import Denoiser
from unmask.models.precision import autocast
from unmask.tasks.task import Task
from unmask.types import CleanBatch


@dataclass(frozen=True)
class Accuracy:
    """Shares of examples by measure (`accuracy` first), and forward passes per example."""

    shares: dict[str, float]
    nfe: float
    n: int

    @property
    def accuracy(self) -> float:
        return self.shares["accuracy"]

    @property
    def stderr(self) -> float:
        """Of a binomial share."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n)


def accuracy(
    model: Denoiser,
    task: Task,
    examples: CleanBatch,
    config: DecodeConfig,
    *,
    dtype: str = "float32",
) -> Accuracy:
    """Decodes `examples` from their prompts and grades them."""
    device = next(model.parameters()).device
    decoder = build_decoder(config, model, task.tokens)
    right: dict[str, int] = {}
    nfe = 0
    for start in range(0, len(examples), config.batch_size):
        part = examples[start : start + config.batch_size]
        prompt = torch.arange(start, start + len(part), device=device)
        with autocast(dtype, device):
            decoded = decoder.decode(part.masked(task.tokens.mask_id).to(device), prompt)
        for measure, is_right in task.grade(part, decoded.tokens).items():
            right[measure] = right.get(measure, 0) + int(is_right.sum())
        nfe += int(decoded.nfe.sum())
    n = len(examples)
    return Accuracy({measure: count / n for measure, count in right.items()}, nfe / n, n)
