"""The protocol of an evaluation: a NELBO, and the accuracy of every decoder asked for, where answers can be right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unmask.config import DecodeConfig
from unmask.evaluation.accuracy import Accuracy, accuracy
from unmask.evaluation.nelbo import Estimate, nelbo, nll
from unmask.evaluation.perplexity import TextLikelihood
from unmask.models.denoiser import Denoiser
from unmask.tasks.task import GradedTask, Task
from unmask.types import CleanBatch


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
    dtype: str,
    update: Callable[[int], None] | None = None,
) -> Evaluation:
    """Evaluates in eval mode, and leaves the model in the mode that it had.

    `update` is told how many of the `len(examples) x len(decoders)` answers are there.
    """

    def tell(number: int) -> Callable[[int], None] | None:
        return None if update is None else lambda done: update(number * len(examples) + done)

    was_training = model.training
    model.eval()
    try:
        estimate = _likelihood(model, task, examples, nelbo_draws, dtype)
        graded = {}
        if isinstance(task, GradedTask):
            graded = {
                config.label: accuracy(model, task, examples, config, dtype=dtype, update=tell(number))
                for number, config in enumerate(decoders)
            }
        return Evaluation(estimate, model.is_causal, graded, _of_text(estimate, task, examples))
    finally:
        model.train(was_training)


def _likelihood(model: Denoiser, task: Task, examples: CleanBatch, draws: int, dtype: str) -> Estimate | None:
    if not examples.is_known(task.tokens.mask_id):
        return None
    if model.is_causal:
        return nll(model, examples, eos_id=task.tokens.eos_id, dtype=dtype)
    return nelbo(model, examples, draws=draws, dtype=dtype)


def _of_text(estimate: Estimate | None, task: Task, examples: CleanBatch) -> TextLikelihood | None:
    extent = getattr(task, "extent", None)
    if estimate is None or extent is None:
        return None
    return TextLikelihood.of(estimate.value, int((~examples.prompt_mask).sum()), extent(examples))
