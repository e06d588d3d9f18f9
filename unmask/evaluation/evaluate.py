"""The protocol of an evaluation: a NELBO, and the accuracy of every decoder asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

from unmask.config import DecodeConfig
from unmask.evaluation.accuracy import Accuracy, accuracy
from unmask.evaluation.nelbo import Estimate, nelbo
from unmask.models.denoiser import Denoiser
from unmask.tasks.task import Task
from unmask.types import CleanBatch


@dataclass(frozen=True)
class Evaluation:
    """`accuracy` by decoder label (see `DecodeConfig.label`), in the order asked for."""

    nelbo: Estimate
    accuracy: dict[str, Accuracy]


def evaluate(
    model: Denoiser,
    task: Task,
    examples: CleanBatch,
    decoders: Sequence[DecodeConfig],
    *,
    nelbo_draws: int,
    dtype: str,
) -> Evaluation:
    """Evaluates in eval mode, and leaves the model in the mode that it had."""
    was_training = model.training
    model.eval()
    try:
        return Evaluation(
            nelbo=nelbo(model, examples, draws=nelbo_draws, dtype=dtype),
            accuracy={config.label: accuracy(model, task, examples, config, dtype=dtype) for config in decoders},
        )
    finally:
        model.train(was_training)
