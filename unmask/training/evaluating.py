"""The evaluations of a run, and the names of their figures in `metrics.jsonl`."""

from typing import Any

from unmask.config.run import RunConfig
from unmask.decoding.build import build_decoder
from unmask.errors import UserError
from unmask.evaluation.evaluate import Evaluation, evaluate
from unmask.evaluation.text import TextMeasures
from unmask.models.denoiser import NOTHING_BEFORE
from unmask.progress import warn
from unmask.tasks.task import Task, is_graded
from unmask.training.trainer import Trainer
from unmask.types import CleanBatch


class Evaluator:
    """Evaluates a run's weights on held-out examples, and on the text measures of the section `eval`.

    Raises:
        UserError: the model cannot be evaluated as `eval` says, or cannot be trained on such examples.
    """

    def __init__(self, config: RunConfig, task: Task, examples: CleanBatch, trainer: Trainer) -> None:
        self.config, self.task, self.examples, self.trainer = config, task, examples, trainer
        self.decoders = config.eval.decoders(config.decode)
        if trainer.peers.is_main:
            warn_of_fewer(examples, config.eval.examples, "eval.examples=")
        model = trainer.model
        for decoder in self.decoders if is_graded(config) else ():
            build_decoder(decoder, model, task.tokens, rows=len(examples) // trainer.peers.size)
        if model.alignment == "next" and not examples.prompt_mask[:, 0].all():
            raise UserError(NOTHING_BEFORE)
        self.text = TextMeasures.from_config(config, task, model)

    def __call__(self) -> dict[str, Evaluation]:
        """Returns the evaluation of each kind of weights; the first is the run's result. Collective."""
        first, *others = evaluated_weights(self.config)
        return {first: self._evaluate(first, self.text)} | {name: self._evaluate(name) for name in others}

    def about_text(self) -> dict[str, Any]:
        """Returns what the corpora and questions are, for the protocols of the run's evaluations."""
        return {} if self.text is None else self.text.protocol(self.trainer.model)

    def _evaluate(self, weights: str, text: TextMeasures | None = None) -> Evaluation:
        trainer, draws = self.trainer, self.config.eval.nelbo_draws
        with trainer.weights(weights):
            return evaluate(
                trainer.model,
                self.task,
                self.examples,
                self.decoders,
                nelbo_draws=draws,
                text=text,
                peers=trainer.peers,
            )


def warn_of_fewer(examples: CleanBatch, asked: int, option: str) -> None:
    """Warns if there are fewer held-out `examples` than were `asked` for with `option`."""
    if len(examples) < asked:
        warn(f"{option}{asked}: the data hold out {len(examples):,} examples, and all of them are taken")


def metrics(results: dict[str, Evaluation]) -> dict[str, float | None]:
    """Names the figures of evaluations by weights: all of the first, and NELBO and accuracies of each.

    An accuracy is that of the answers that were graded; without any there is none.
    """
    first = next(iter(results.values()))
    values: dict[str, float | None] = {f"eval/{name}": value for name, value in first.values().items()}
    if first.accuracy:
        values["eval/examples"] = next(iter(first.accuracy.values())).n
    for weights, result in results.items():
        values[f"eval/nelbo/{weights}"] = result.nelbo
        values |= {rate(weights, label): measured.accuracy for label, measured in result.accuracy.items() if measured.n}
        values |= {f"eval/not_graded/{weights}/{label}": count for label, count in result.not_graded.items()}
    return values


def evaluated_weights(config: RunConfig) -> list[str]:
    """Returns the weights to evaluate, of `eval.weights`: `ema` only if there is an average."""
    return [name for name in dict.fromkeys(config.eval.weights) if name == "raw" or config.ema.decay] or ["raw"]


def rate(weights: str, decoder: str) -> str:
    """Names an accuracy in `metrics.jsonl`, by weights and `DecodeConfig.label`."""
    return f"eval/accuracy/{weights}/{decoder}"


def rates(config: RunConfig) -> list[str]:
    """Names all accuracies of a run's evaluations (`eval/accuracy` repeats the first); none for running text."""
    if not is_graded(config):
        return []
    labels = [decoder.label for decoder in config.eval.decoders(config.decode)]
    return [rate(weights, label) for weights in evaluated_weights(config) for label in labels]
