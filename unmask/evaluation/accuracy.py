"""The accuracy of a decoder: examples are decoded from their prompts, and the task grades the answers.

Dimensions: B rows of a batch, L positions.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Int
from torch import Tensor

from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig
from unmask.evaluation.nelbo import batches_of
from unmask.evaluation.statistics import share_text, wilson
from unmask.models.denoiser import Denoiser
from unmask.peers import ALONE, Peers
from unmask.tasks.task import GradedTask, Grades, Task
from unmask.types import CleanBatch, Decoded


@dataclass(frozen=True)
class Accuracy:
    """Shares of graded examples by measure (`accuracy` first; nan if none is), and forward passes per example."""

    shares: dict[str, float]
    nfe: float
    n: int
    records: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """One for each example decoded by this process: the task's record of prompt and answer, its grades, and `nfe`."""
    not_graded: int = 0
    """Answers, beside the `n`, that the machine could not grade."""

    @property
    def accuracy(self) -> float:
        return self.shares["accuracy"]

    @property
    def right(self) -> int:
        """The number of right answers."""
        return round(self.accuracy * self.n) if self.n else 0

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval (Wilson)."""
        return self.intervals["accuracy"]

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % interval (Wilson) of each share, by measure."""
        n = self.n
        return {name: wilson(round(share * n), n) if n else (0.0, 1.0) for name, share in self.shares.items()}

    def text(self, measure: str) -> str:
        """Formats the share of `measure` with its interval."""
        return share_text(round(self.shares[measure] * self.n), self.n) if self.n else "not graded"

    @property
    def reasons(self) -> dict[str, int]:
        """Counts of each recorded `reason`, the most frequent first; empty for tasks that give none."""
        graded = (
            record["reason"] for record in self.records if "reason" in record and record.get("accuracy", 0) is not None
        )
        return dict(Counter(graded).most_common())

    @property
    def groups(self) -> dict[str, "Accuracy"]:
        """The accuracy on each kind of example that a task tells apart, of those decoded by this process."""
        found: dict[str, list[dict[str, Any]]] = {}
        for record in self.records:
            if "group" in record and record["accuracy"] is not None:
                found.setdefault(record["group"], []).append(record)
        return {
            group: Accuracy({"accuracy": _mean(own, "accuracy")}, _mean(own, "nfe"), len(own))
            for group, own in sorted(found.items(), key=lambda item: (len(item[0]), item[0]))  # 9 before 10
        }

    @property
    def stderr(self) -> float | None:
        """The standard error of `accuracy`."""
        return self.stderr_of("accuracy")

    def stderr_of(self, measure: str) -> float | None:
        """Returns the standard error of a binomial share; None for a single example."""
        share = self.shares[measure]
        return None if self.n < 2 else math.sqrt(share * (1 - share) / self.n)


def _mean(records: Sequence[dict[str, Any]], key: str) -> float:
    return sum(record[key] for record in records) / len(records)


@dataclass(frozen=True)
class Answers:
    """Number of right answers by measure, and a record of each answer; of one process."""

    right: dict[str, int]
    records: list[dict[str, Any]]
    not_graded: int = 0

    def over_all(self, peers: Peers = ALONE) -> Accuracy:
        """Returns the accuracy over all examples; `peers` have decoded the others. Collective."""
        own = self.right, sum(record["nfe"] for record in self.records), len(self.records), self.not_graded
        rights, nfes, counts, failed = zip(*peers.exchange(own), strict=True)
        n = sum(counts) - sum(failed)
        totals = {measure: sum(right.get(measure, 0) for right in rights) for measure in rights[0]}  # rank 0 has some
        shares = {measure: total / n if n else math.nan for measure, total in totals.items()}
        return Accuracy(shares, sum(nfes) / sum(counts), n, self.records, sum(failed))


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
    decoder = build_decoder(config, model, task.tokens, rows=len(examples))
    records: list[dict[str, Any]] = []
    right: dict[str, int] = {}
    not_graded = 0
    for rows in batches_of(len(examples), share, config.batch_size):
        part = examples.at(rows)
        canvases = part.masked(task.tokens.mask_id)
        decoded = decoder.decode(canvases.to(device), rows.to(device))
        grades = task.grade(part, decoded.tokens)
        for measure, is_right in grades.measures.items():
            counts = is_right if grades.is_graded is None else is_right & grades.is_graded
            right[measure] = right.get(measure, 0) + int(counts.sum())
        not_graded += 0 if grades.is_graded is None else int((~grades.is_graded).sum())
        records += _records(task, canvases, decoded, grades)
        if update is not None:
            update(len(records))
    return Answers(right, records, not_graded)


def _records(task: Task, canvases: Int[Tensor, "B L"], decoded: Decoded, grades: Grades) -> list[dict[str, Any]]:
    tokens, measures = decoded.tokens.cpu(), {name: value.tolist() for name, value in grades.measures.items()}
    is_graded = [True] * len(canvases) if grades.is_graded is None else grades.is_graded.tolist()
    return [
        task.record(canvases[row], tokens[row])
        | {name: values[row] if is_graded[row] else None for name, values in measures.items()}
        | (grades.details[row] if grades.details else {})
        | ({"group": grades.groups[row]} if grades.groups else {})
        | {"nfe": int(decoded.nfe[row])}
        for row in range(len(canvases))
    ]
