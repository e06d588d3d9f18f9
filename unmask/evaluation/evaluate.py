"""The protocol of an evaluation: a NELBO, and the accuracy of every decoder asked for, where answers can be right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unmask.config import DecodeConfig
from unmask.evaluation.accuracy import Accuracy, answers
from unmask.evaluation.nelbo import Estimate, RowLikelihoods, row_nelbos, row_nlls
from unmask.evaluation.perplexity import TextLikelihood
from unmask.models.denoiser import Denoiser
from unmask.peers import ALONE, Peers
from unmask.tasks.task import GradedTask, Task
from unmask.types import CleanBatch


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
    dtype: str,
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
        with peers.agreed(EvaluationLeft):  # each at its own pace
            likelihoods = None
            if examples.is_known(task.tokens.mask_id):
                likelihoods = row_likelihoods(model, task, examples, draws=nelbo_draws, dtype=dtype, share=peers.share)
            graded = {}
            if isinstance(task, GradedTask):
                graded = {
                    config.label: answers(
                        model, task, examples, config, share=peers.share, dtype=dtype, update=tell(number)
                    )
                    for number, config in enumerate(decoders)
                }
        estimate = None if likelihoods is None else likelihoods.over_corpus(peers)
        accuracy = {label: own.over_all(peers) for label, own in graded.items()}
        return Evaluation(estimate, model.is_causal, accuracy, _of_text(estimate, task, examples))
    finally:
        model.train(was_training)


def row_likelihoods(
    model: Denoiser, task: Task, examples: CleanBatch, *, draws: int, dtype: str, share: slice = slice(None)
) -> RowLikelihoods:
    """Exact of a causal model, else a bound; of examples whose answers are known as tokens."""
    if model.is_causal:
        return row_nlls(model, examples, eos_id=task.tokens.eos_id, dtype=dtype, share=share)
    return row_nelbos(model, examples, draws=draws, dtype=dtype, share=share)


def _of_text(estimate: Estimate | None, task: Task, examples: CleanBatch) -> TextLikelihood | None:
    extent = getattr(task, "extent", None)
    if estimate is None or extent is None:
        return None
    return TextLikelihood.of(estimate.value, int((~examples.prompt_mask).sum()), extent(examples))
