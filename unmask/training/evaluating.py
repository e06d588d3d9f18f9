"""What the evaluations of a run measure, and what they call it."""

from dataclasses import dataclass

from unmask.config.run import RunConfig
from unmask.decoding.build import build_decoder
from unmask.errors import UserError
from unmask.evaluation.evaluate import Evaluation, EvaluationLeft, evaluate
from unmask.evaluation.text import TextMeasures, in_words
from unmask.models.denoiser import NOTHING_BEFORE
from unmask.tasks.task import Task, is_graded
from unmask.training.trainer import Trainer
from unmask.types import CleanBatch


@dataclass(frozen=True)
class Evaluated:
    """One evaluation; `score` and `nelbo` are those by which runs choose their best step."""

    values: dict[str, float]
    """For `metrics.jsonl`, by name."""
    score: float
    nelbo: float
    words: str
    """For the terminal."""


class Evaluator:
    """Held-out examples under all weights asked for, and, of text, what `eval` asks for beside them.

    Raises:
        UserError: the model cannot be evaluated as asked, or not be trained on such examples.
    """

    def __init__(self, config: RunConfig, task: Task, examples: CleanBatch, trainer: Trainer) -> None:
        self.config, self.task, self.examples, self.trainer = config, task, examples, trainer
        self.decoders = config.eval.decoders(config.decode)
        self._check_model()
        self.text_measures = TextMeasures.of(config, task, trainer.model, trainer.device)

    def _check_model(self) -> None:
        model = self.trainer.model
        for decoder in self.decoders if is_graded(self.config) else ():
            build_decoder(decoder, model, self.task.tokens)
        if model.alignment == "next" and not self.examples.prompt_mask[:, 0].all():
            raise UserError(NOTHING_BEFORE)

    def __call__(self) -> Evaluated:
        """All processes evaluate together, and share the examples."""
        results = {name: self._of_weights(name) for name in evaluated_weights(self.config)}
        headline = next(iter(results.values()))
        assert headline.nelbo is not None, "held-out examples are known"
        values = {f"eval/{name}": value for name, value in headline.likelihoods().items()}
        score = next((measured.accuracy for measured in headline.accuracy.values()), 0.0)
        if headline.accuracy:
            values["eval/accuracy"] = score
        for name, result in results.items():
            values |= _named(name, result)
        values |= self._of_text(next(iter(results)))
        return Evaluated(values, score, headline.nelbo.value, f"{_in_words(headline)}{in_words(values)}")

    def _of_weights(self, name: str) -> Evaluation:
        trainer = self.trainer
        with trainer.weights(name):
            return evaluate(
                trainer.model,
                self.task,
                self.examples,
                self.decoders,
                nelbo_draws=self.config.eval.nelbo_draws,
                peers=trainer.peers,
            )

    def _of_text(self, weights: str) -> dict[str, float]:
        with self.trainer.weights(weights), self.trainer.peers.raise_together(EvaluationLeft):
            return self.text_measures(self.trainer.model)


def _named(weights: str, result: Evaluation) -> dict[str, float]:
    assert result.nelbo is not None, "the same examples"
    shares = {rate(weights, label): measured.accuracy for label, measured in result.accuracy.items()}
    return {f"eval/nelbo/{weights}": result.nelbo.value} | shares


def evaluated_weights(config: RunConfig) -> list[str]:
    """`ema` counts only where there is an average."""
    return [name for name in config.eval.weights if name == "raw" or config.ema.decay] or ["raw"]


def rate(weights: str, decoder: str) -> str:
    """What the share of examples solved is called in `metrics.jsonl`, by weights and `DecodeConfig.label`."""
    return f"eval/accuracy/{weights}/{decoder}"


def rates(config: RunConfig) -> list[str]:
    """All shares that the evaluations of a run will write; `eval/accuracy` repeats the first. None of running text."""
    if not is_graded(config):
        return []
    labels = [decoder.label for decoder in config.eval.decoders(config.decode)]
    return [rate(weights, label) for weights in evaluated_weights(config) for label in labels]


def _in_words(result: Evaluation) -> str:
    assert result.nelbo is not None, "held-out examples are known"
    shown = ", ".join(f"{label} {measured.accuracy:.1%}" for label, measured in result.accuracy.items())
    text = "" if result.text is None else f", {result.text.bits_per_byte:.3f} bits per byte"
    accuracy = f"accuracy {shown}; " if shown else ""
    return f"{accuracy}{result.likelihood} {result.nelbo.value:.4f} nats{text}"
