"""Compares the likelihood of examples that a run has trained on with that of held-out ones.

Dimensions: B rows of the global batch, R examples.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import hypot

import torch
from jaxtyping import Int
from torch import Tensor

from unmask.data.stream import ExampleStream
from unmask.evaluation.nelbo import Estimate, measure_likelihood
from unmask.lab.diagnostics.measures import NotApplicable
from unmask.training.loading import LoadedRun
from unmask.training.trainer import Trainer
from unmask.types import CleanBatch


@dataclass(frozen=True)
class Overfitting:
    """The NELBO (for a causal model: NLL) of examples trained on and held out, and how often a run saw its data."""

    examples_seen: int
    """Examples drawn from the training stream."""
    distinct: int
    """Entries of the data set among them, before any augmentation; equal ones count each."""
    passes: float
    """Passes over the data set."""
    steps_per_example: float
    """Consecutive training steps on an example each time it is drawn: 1, or more in a pool."""
    visits: float
    """Training steps on each of these entries in all: `steps x B / distinct`."""
    examples: int
    recent: Estimate | None
    """The last examples whose training has finished; None if there are none."""
    early: Estimate
    """The first examples trained on."""
    held_out: Estimate

    def gap(self, trained: Estimate) -> Estimate:
        """Returns held out minus `trained`, in nats per maskable token: above 0 if the run overfits."""
        errors = self.held_out.stderr, trained.stderr
        error = None if errors[0] is None or errors[1] is None else hypot(errors[0], errors[1])
        return Estimate(self.held_out.value - trained.value, error)


def measure_overfitting(
    run: LoadedRun, held_out: CleanBatch, *, draws: int, on_progress: Callable[[float], None]
) -> Overfitting:
    """Measures the overfitting of the checkpoint. Draws the next batch from the process, which advances it.

    Raises:
        NotApplicable: the answers are not known as tokens, or nothing was trained on yet.
    """
    if not held_out.is_known(run.tokens.mask_id):
        raise NotApplicable("the held-out answers are not known as tokens, so they have no likelihood")
    trainer = run.trainer()
    seen, batch_size = trainer.process.examples_seen, trainer.shard.total
    if seen == 0:
        raise NotApplicable("the checkpoint is from before the first step")
    before = find_last_finished(trainer, len(held_out))
    sets = [
        held_out,
        trainer.stream[find_first(trainer, seen, len(held_out))],
        *([trainer.stream[before]] if len(before) else []),
    ]
    found = []
    with trainer.weights(run.weights):
        for examples in sets:
            likelihoods = measure_likelihood(trainer.model, run.task, examples, draws=draws)
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


def find_first(trainer: Trainer, seen: int, limit: int) -> Int[Tensor, "R"]:
    """Returns the numbers, in the training stream, of up to `limit` of the first of `seen` examples trained on."""
    # Each row of a pool begins with one of them. Rows go on at their own pace, and --restart-pool passes over what the
    # slower ones had not reached.
    is_restarted = getattr(trainer.process, "first_turn", 0) > 0
    total = trainer.shard.total
    return torch.arange(min(limit, total if is_restarted else max(total, seen // 2), seen))


def find_last_finished(trainer: Trainer, limit: int) -> Int[Tensor, "R"]:
    """Returns the numbers, in the training stream, of up to `limit` examples whose training is finished, newest first.

    Row r takes the examples r, r + B, r + 2 B, .. in turn. In every process, the example that a row requests next is at
    most two after the last one that it has finished. What --restart-pool passed over was never drawn: only examples of
    the present pool count.
    """
    recorder, total = _RecordingStream(trainer.stream), trainer.shard.total
    trainer.process.load_state_dict(trainer.process.state_dict())  # so that prefetched examples are requested again
    trainer.process.next_batch(recorder)
    upcoming = torch.tensor(recorder.requested[: trainer.shard.size], dtype=torch.long)
    rounds = -(-limit // max(1, len(upcoming)))
    number = torch.cat([upcoming - (2 + back) * total for back in range(rounds)])
    return number[number >= getattr(trainer.process, "first_turn", 0) * total].sort(descending=True).values[:limit]


@dataclass(frozen=True)
class _RecordingStream:
    """A stream that records the numbers of the examples requested from it."""

    stream: ExampleStream
    requested: list[int] = field(default_factory=list)

    def __getitem__(self, number: Int[Tensor, "n"]) -> CleanBatch:
        self.requested.extend(number.tolist())
        return self.stream[number]
