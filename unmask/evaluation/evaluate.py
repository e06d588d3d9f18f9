"""The protocol of an evaluation: a NELBO, and the accuracy of every decoder asked for, where answers can be right.

The likelihood of running text in the units of language models.

The share of examples that a decoder gets right.
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
from unmask.evaluation.nelbo import Estimate, RowLikelihoods, batches_of, row_nelbos, row_nlls
from unmask.evaluation.statistics import wilson
from unmask.models.denoiser import Denoiser
from unmask.peers import ALONE, Peers
from unmask.tasks.task import Extent, GradedTask, Grades, Task
from unmask.types import CleanBatch, Decoded


@dataclass(frozen=True)
class TextLikelihood:
    """Bounds, as the NELBO is one; exact for a causal model."""

    ppl: float
    """exp of the nats per token of text, a document's end token among them and its padding not."""
    bits_per_byte: float
    """Of the text, whatever the tokenizer."""
    rows: str
    """As `Extent.rows`."""

    @staticmethod
    def of(nelbo: float, num_maskable: int, extent: Extent) -> "TextLikelihood":
        """From nats per maskable token: `nelbo x num_maskable` is what all of the text costs, its padding too."""
        nats = nelbo * num_maskable
        return TextLikelihood(
            ppl=math.exp(min(700.0, nats / extent.tokens)),  # what no float holds is of a model that has diverged
            bits_per_byte=nats / (math.log(2) * max(1, extent.bytes)),
            rows=extent.rows,
        )


@dataclass(frozen=True)
class Accuracy:
    """Shares of examples by measure (`accuracy` first), and forward passes per example."""

    shares: dict[str, float]
    nfe: float
    n: int
    records: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """Of each example that was decoded here: what the task records of its prompt and answer, what is right about it,
    and `nfe`."""

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


@dataclass(frozen=True)
class Answers:
    """How many answers are right, by measure, and what is recorded of each."""

    right: dict[str, int]
    records: list[dict[str, Any]]

    def over_all(self, peers: Peers = ALONE) -> Accuracy:
        """The shares of all examples; `peers` have decoded the others."""
        own = self.right, sum(record["nfe"] for record in self.records), len(self.records)
        rights, nfes, counts = zip(*peers.exchange(own), strict=True)
        n = sum(counts)  # rank 0 has some, and so knows the measures
        shares = {measure: sum(right.get(measure, 0) for right in rights) / n for measure in rights[0]}
        return Accuracy(shares, sum(nfes) / n, n, self.records)


def answers(
    model: Denoiser,
    task: GradedTask,
    examples: CleanBatch,
    config: DecodeConfig,
    *,
    share: slice = slice(None),
    update: Callable[[int], None] | None = None,
) -> Answers:
    """Decodes the examples of `share` from their prompts and grades them; `update` is told how many are done."""
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


class EvaluationLeft(Exception):
    """What a hook of the model raises to leave an evaluation; all processes do, if one does."""


@dataclass(frozen=True)
class Evaluation:
    """`accuracy` by decoder label (see `DecodeConfig.label`), in the order asked for."""

    nelbo: Estimate | None
    """Nats per maskable token; None where no answers are known. Of a causal model the NLL itself: `is_exact`."""
    is_exact: bool
    accuracy: dict[str, Accuracy]
    """Empty where nothing is right or wrong."""
    text: TextLikelihood | None = None
    """The same likelihood, of running text."""

    @property
    def likelihood(self) -> str:
        """What it is called."""
        return "NLL" if self.is_exact else "NELBO"

    def likelihoods(self) -> dict[str, float]:
        """The NELBO and, of running text, its other units, by name."""
        own = {} if self.nelbo is None else {"nelbo": self.nelbo.value, "nelbo_stderr": self.nelbo.stderr}
        text = {} if self.text is None else {"ppl": self.text.ppl, "bits_per_byte": self.text.bits_per_byte}
        return own | text


def evaluate(
    model: Denoiser,
    task: Task,
    examples: CleanBatch,
    decoders: Sequence[DecodeConfig],
    *,
    nelbo_draws: int,
    update: Callable[[int], None] | None = None,
    peers: Peers = ALONE,
) -> Evaluation:
    """Evaluates in eval mode, and leaves the model in the mode that it had. `peers` share the examples.

    `update` is told how many of the `len(examples) x len(decoders)` answers are there.
    """

    def tell(number: int) -> Callable[[int], None] | None:
        return None if update is None else lambda done: update(number * len(examples) + done)

    was_training = model.training
    model.eval()
    try:
        with peers.raise_together(EvaluationLeft):  # each at its own pace
            likelihoods = None
            if examples.is_known(task.tokens.mask_id):
                likelihoods = row_likelihoods(model, task, examples, draws=nelbo_draws, share=peers.share)
            graded = {}
            if isinstance(task, GradedTask):
                graded = {
                    config.label: answers(model, task, examples, config, share=peers.share, update=tell(number))
                    for number, config in enumerate(decoders)
                }
        estimate = None if likelihoods is None else likelihoods.over_corpus(peers)
        accuracy = {label: own.over_all(peers) for label, own in graded.items()}
        return Evaluation(estimate, model.is_causal, accuracy, _of_text(estimate, task, examples))
    finally:
        model.train(was_training)


def row_likelihoods(
    model: Denoiser, task: Task, examples: CleanBatch, *, draws: int, share: slice = slice(None)
) -> RowLikelihoods:
    """Exact of a causal model, else a bound; of examples whose answers are known as tokens."""
    if model.is_causal:
        return row_nlls(model, examples, eos_id=task.tokens.eos_id, share=share)
    return row_nelbos(model, examples, draws=draws, share=share)


def _of_text(estimate: Estimate | None, task: Task, examples: CleanBatch) -> TextLikelihood | None:
    extent = getattr(task, "extent", None)
    if estimate is None or extent is None:
        return None
    return TextLikelihood.of(estimate.value, int((~examples.prompt_mask).sum()), extent(examples))
