"""The accuracy of a decoder: examples are decoded from their prompts, and the task grades the answers.

Dimensions: B rows of a batch, L positions.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Int
from torch import Tensor

from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig
from unmask.evaluation.nelbo import batches_of
from unmask.evaluation.statistics import wilson
from unmask.models.denoiser import Denoiser
from unmask.peers import ALONE, Peers
from unmask.tasks.task import GradedTask, Grades, Task
from unmask.types import CleanBatch, Decoded


@dataclass(frozen=True)
class Accuracy:
    """Shares of examples by measure (`accuracy` first), and forward passes per example."""

    shares: dict[str, float]
    nfe: float
    n: int
    records: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """One for each example decoded by this process: the task's record of prompt and answer, its grades, and `nfe`."""

    @property
    def accuracy(self) -> float:
        return self.shares["accuracy"]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval (Wilson)."""
        return wilson(round(self.accuracy * self.n), self.n)

    @property
    def reasons(self) -> dict[str, int]:
        """Counts of each recorded `reason`, the most frequent first; empty for tasks that give none."""
        return dict(Counter(record["reason"] for record in self.records if "reason" in record).most_common())

    @property
    def stderr(self) -> float:
        """The standard error of a binomial share."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n)


@dataclass(frozen=True)
class Answers:
    """Number of right answers by measure, and a record of each answer; of one process."""

    right: dict[str, int]
    records: list[dict[str, Any]]

    def over_all(self, peers: Peers = ALONE) -> Accuracy:
        """Returns the accuracy over all examples; `peers` have decoded the others. Collective."""
        own = self.right, sum(record["nfe"] for record in self.records), len(self.records)
        rights, nfes, counts = zip(*peers.exchange(own), strict=True)
        n = sum(counts)  # rank 0 has some, and so knows the measures
        shares = {measure: sum(right.get(measure, 0) for right in rights) / n for measure in rights[0]}
        return Accuracy(shares, sum(nfes) / n, n, self.records)


def grade_answers(
    model: Denoiser,
    task: GradedTask,
    examples: CleanBatch,
    config: DecodeConfig,
    *,
    share: slice = slice(None),
    update: Callable[[int], None] | None = None,
) -> Answers:
    """Decodes the examples of `share` from their prompts and grades them; calls `update` with the number done."""
    device = next(model.parameters()).device
    decoder = build_decoder(config, model, task.tokens)
    records: list[dict[str, Any]] = []
    right: dict[str, int] = {}
    for rows in batches_of(len(examples), share, config.batch_size):
        part = examples.at(rows)
        canvases = part.masked(task.tokens.mask_id)
        decoded = decoder.decode(canvases.to(device), rows.to(device))
        grades = task.grade(part, decoded.tokens)
        for measure, is_right in grades.measures.items():
            right[measure] = right.get(measure, 0) + int(is_right.sum())
        records += _records(task, canvases, decoded, grades)
        if update is not None:
            update(len(records))
    return Answers(right, records)


def _records(task: Task, canvases: Int[Tensor, "B L"], decoded: Decoded, grades: Grades) -> list[dict[str, Any]]:
    tokens, measures = decoded.tokens.cpu(), {name: value.tolist() for name, value in grades.measures.items()}
    return [
        task.record(canvases[row], tokens[row])
        | {name: values[row] for name, values in measures.items()}
        | (grades.details[row] if grades.details else {})
        | {"nfe": int(decoded.nfe[row])}
        for row in range(len(canvases))
    ]
