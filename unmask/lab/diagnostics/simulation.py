"""Simulates a run's masking process on given examples, with its model as it is.

Dimensions: R examples, C copies of each, B = R C rows, L positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from unmask import noise
from unmask.masking.process import MaskingProcess, ProcessContext, RowShard, build_process
from unmask.noise import Purpose
from unmask.training.loading import LoadedRun
from unmask.types import CleanBatch, MaskedBatch

_MOST_STEPS = 64


@dataclass(frozen=True)
class RepeatedExamples:
    """A stream that repeats `examples` for ever.

    If the number of rows is a multiple of R, row r always holds example r mod R. Copies of an example differ in their
    number in the stream, and so in their noise.
    """

    examples: CleanBatch

    def __getitem__(self, number: Int[Tensor, "n"]) -> CleanBatch:
        own = number % len(self.examples)
        return CleanBatch(x0=self.examples.x0[own], prompt_mask=self.examples.prompt_mask[own])


@torch.no_grad()
def simulate_masking(
    run: LoadedRun, examples: CleanBatch, *, copies: int, least: int, on_progress: Callable[[float], None]
) -> list[MaskedBatch]:
    """Runs the masking process without training, and returns its batches of the rows (copy, example), copy by copy.

    A pool starts with random masks. So batches count only after a warm-up, in which as many new examples are drawn as
    there are rows; then the process runs for as many steps as the warm-up took, and at least `least`. The estimates of
    a self-conditioned model are dropped: each is as large as a hidden state.
    """
    trainer = run.trainer()
    process, stream = _fresh_process(run, len(examples) * copies), RepeatedExamples(examples)
    batches: list[MaskedBatch] = []
    num_warm, start = 0, 0
    while len(batches) < max(least, num_warm):
        batch = process.next_batch(stream)
        start = start or process.examples_seen
        process.observe(batch, trainer.model(batch))
        if process.examples_seen >= start + len(examples) * copies or num_warm == _MOST_STEPS:
            batches.append(replace(batch, estimate=None).to(torch.device("cpu")))
        else:
            num_warm += 1
        on_progress(0.5 * num_warm / _MOST_STEPS if not batches else 0.5 + 0.5 * len(batches) / max(least, num_warm))
    return batches


def _fresh_process(run: LoadedRun, num_rows: int) -> MaskingProcess:
    """Builds the run's process in its present state, but with new rows."""
    config, trainer = run.config, run.trainer()
    context = ProcessContext(
        tokens=run.tokens,
        shard=RowShard.whole(num_rows),
        seed=noise.integer(config.train.seed, Purpose.EVALUATE),
        device=trainer.device,
    )
    process = build_process(config.process, context)
    state, without_rows = trainer.process.state_dict(), getattr(trainer.process, "drop_rows", None)
    process.load_state_dict(state if without_rows is None else without_rows(state))
    return process
