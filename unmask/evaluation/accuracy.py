"""The share of examples that a decoder gets right."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from unmask.config import DecodeConfig
from unmask.decoding.build import build_decoder
from unmask.interval import wilson
from unmask.models.denoiser import Denoiser
from unmask.models.precision import autocast
from unmask.tasks.task import GradedTask, Grades, Task
from unmask.types import CleanBatch, Decoded


@dataclass(frozen=True)
class Accuracy:
    """Shares of examples by measure (`accuracy` first), and forward passes per example."""

    shares: dict[str, float]
    nfe: float
    n: int
    records: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """Of each example: what the task records of its prompt and answer, what is right about it, and `nfe`."""

    @property
    def accuracy(self) -> float:
        return self.shares["accuracy"]

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 % (Wilson)."""
        return wilson(round(self.accuracy * self.n), self.n)

    @property
    def reasons(self) -> dict[str, int]:
        """How often each `reason` was recorded, the most frequent first; empty for tasks that give none."""
        return dict(Counter(record["reason"] for record in self.records if "reason" in record).most_common())

    @property
    def stderr(self) -> float:
        """Of a binomial share."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n)


def accuracy(
    model: Denoiser,
    task: GradedTask,
    examples: CleanBatch,
    config: DecodeConfig,
    *,
    dtype: str = "float32",
    update: Callable[[int], None] | None = None,
) -> Accuracy:
    """Decodes `examples` from their prompts and grades them; `update` is told how many are done."""
    device = next(model.parameters()).device
    decoder = build_decoder(config, model, task.tokens)
    records: list[dict[str, Any]] = []
    right: dict[str, int] = {}
    for start in range(0, len(examples), config.batch_size):
        part = examples[start : start + config.batch_size]
        prompt = torch.arange(start, start + len(part), device=device)
        canvases = part.masked(task.tokens.mask_id)
        with autocast(dtype, device):
            decoded = decoder.decode(canvases.to(device), prompt)
        grades = task.grade(part, decoded.tokens)
        for measure, is_right in grades.measures.items():
            right[measure] = right.get(measure, 0) + int(is_right.sum())
        records += _records(task, canvases, decoded, grades)
        if update is not None:
            update(len(records))
    n = len(examples)
    shares = {measure: count / n for measure, count in right.items()}
    return Accuracy(shares, sum(record["nfe"] for record in records) / n, n, records)


def _records(task: Task, canvases: Int[Tensor, "B L"], decoded: Decoded, grades: Grades) -> list[dict[str, Any]]:
    tokens, measures = decoded.tokens.cpu(), {name: value.tolist() for name, value in grades.measures.items()}
    return [
        task.record(canvases[row], tokens[row])
        | {name: values[row] for name, values in measures.items()}
        | (grades.details[row] if grades.details else {})
        | {"nfe": int(decoded.nfe[row])}
        for row in range(len(canvases))
    ]
