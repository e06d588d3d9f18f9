"""Whether a run knows the examples that it has trained on better than others.

Dimensions: B rows of the global batch, R examples.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import hypot

import torch
from jaxtyping import Int
from torch import Tensor

from unmask.data.stream import ExampleStream
from unmask.evaluation.evaluate import row_likelihoods
from unmask.evaluation.nelbo import Estimate
from unmask.lab.diagnostics.subject import NotApplicable, Subject
from unmask.types import CleanBatch


@dataclass(frozen=True)
class Overfitting:
    examples_seen: int
    """Drawn from the training stream."""
    distinct: int
    """Of the data set, before any augmentation."""
    passes: float
    """Over the data set."""
    steps_per_example: float
    """That an example is trained on, one after the other, each time it is drawn: 1, or a row's life in a pool."""
    visits: float
    """That a distinct example has had in all: `steps x B / distinct`."""
    examples: int
    recent: Estimate | None
    """NELBO (of a causal model: NLL) of the last examples that were trained on to their end."""
    early: Estimate
    """Of the first ones."""
    held_out: Estimate

    def gap(self, trained: Estimate) -> Estimate:
        """By how much held-out examples are harder: nats per maskable token, above 0 where the run overfits."""
        return Estimate(self.held_out.value - trained.value, hypot(self.held_out.stderr, trained.stderr))


@dataclass(frozen=True)
class _Recorder:
    """A stream that remembers what was asked for."""

    stream: ExampleStream
    asked: list[int] = field(default_factory=list)

    def __getitem__(self, number: Int[Tensor, "n"]) -> CleanBatch:
        self.asked.extend(number.tolist())
        return self.stream[number]


def measure_overfitting(
    subject: Subject, held_out: CleanBatch, *, draws: int, on_progress: Callable[[float], None]
) -> Overfitting:
    """As of the checkpoint. Looks at what the process draws next, which moves it on.

    Raises:
        NotApplicable: answers that are not known as tokens, or nothing was trained on yet.
    """
    if not held_out.is_known(subject.task.tokens.mask_id):
        raise NotApplicable("the held-out answers are not known as tokens, so they have no likelihood")
    trainer = subject.trainer
    seen, batch_size = trainer.process.examples_seen, trainer.shard.total
    if seen == 0:
        raise NotApplicable("the checkpoint is from before the first step")
    number = torch.arange(min(len(held_out), max(batch_size, seen // 2), seen))
    before = find_last_finished(subject, len(held_out))
    sets = [held_out, trainer.stream[number], *([trainer.stream[before]] if len(before) else [])]
    found = []
    with subject.use_weights(subject.weights):
        for examples in sets:
            likelihoods = row_likelihoods(subject.model, subject.task, examples, draws=draws, dtype=trainer.dtype)
            found.append(likelihoods.over_corpus())
            on_progress(len(found) / len(sets))
    distinct, shown = min(seen, trainer.stream.epoch_size), trainer.step_number * batch_size
    return Overfitting(
        examples_seen=seen,
        distinct=distinct,
        passes=seen / trainer.stream.epoch_size,
        steps_per_example=shown / seen,
        visits=shown / distinct,
        examples=len(held_out),
        recent=found[2] if len(before) else None,
        early=found[1],
        held_out=found[0],
    )


def find_last_finished(subject: Subject, limit: int) -> Int[Tensor, "R"]:
    """The numbers, in the training stream, of up to `limit` examples that were trained on to their end, newest first.

    Row r takes the examples r, r + B, r + 2 B, .. in turn. Whichever process it is, what is asked for next is at most
    two examples ahead of the last one that its row is done with.
    """
    trainer = subject.trainer
    recorder, total = _Recorder(trainer.stream), trainer.shard.total
    trainer.process.load_state_dict(trainer.process.state_dict())  # what it has read ahead is asked for again
    trainer.process.next_batch(recorder)
    upcoming = torch.tensor(recorder.asked[: trainer.shard.size], dtype=torch.long)
    lives = -(-limit // max(1, len(upcoming)))
    number = torch.cat([upcoming - (2 + back) * total for back in range(lives)])
    return number[number >= 0].sort(descending=True).values[:limit]
