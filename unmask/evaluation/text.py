"""The likelihood of text that a model was not trained on: other corpora, as the run's own text is tokenised and cut.

What evaluations during training measure of running text, beside its likelihood: other corpora, and samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unmask.config import recipes
from unmask.config.run import GenerativeConfig, RunConfig
from unmask.config.settings import check_section
from unmask.data.prepare.sources import ENDINGS
from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig, check_guidance
from unmask.errors import UserError
from unmask.evaluation.evaluate import Evaluation, evaluate
from unmask.evaluation.generative import Quality, Samples, check_random, drawn, of_samples, reference, sample
from unmask.evaluation.judge import Scorer
from unmask.models.denoiser import Denoiser
from unmask.progress import warn
from unmask.tasks.task import Task, TextTask
from unmask.types import CleanBatch

_MOST_UNKNOWN = 0.05


@dataclass(frozen=True)
class Corpus:
    name: str
    path: Path
    examples: CleanBatch
    unknown: float
    """The share of its tokens that the tokenizer does not know: they are easily predicted, and say nothing."""


def read_corpora(task: TextTask, paths: Sequence[str | Path], *, limit: int | None, option: str) -> list[Corpus]:
    """Each corpus, up to `limit` rows of it.

    Args:
        option: what the paths were given to, for messages.

    Raises:
        UserError: one is not there, cannot be read, or holds too little text.
    """
    found = [Path(path).expanduser() for path in paths]
    for path in found:
        if not path.exists():
            raise UserError(f"{option}{path}: no such file or folder")
    names = names_of(found, option)
    return [_read(task, name, path, limit, option) for name, path in zip(names, found, strict=True)]


def zero_shot(model: Denoiser, task: TextTask, corpora: Sequence[Corpus], *, nelbo_draws: int) -> dict[str, Evaluation]:
    """By name. Each is evaluated as held-out rows are, with masks that depend on the row's number alone."""
    return {corpus.name: evaluate(model, task, corpus.examples, (), nelbo_draws=nelbo_draws) for corpus in corpora}


def names_of(paths: Sequence[Path], option: str) -> list[str]:
    """What they are called: without the ending, and with as many folders before it as tell them apart.

    Raises:
        UserError: some are the same, or differ in their endings alone.
    """
    whole = [path.absolute() for path in paths]
    for depth in range(1, 1 + max((len(path.parts) for path in whole), default=1)):
        names = ["_".join([*path.parts[-depth:-1], _stem(path)]) for path in whole]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{option}{', '.join(map(str, paths))}: some are the same, or have the same name; give each once")


def _stem(path: Path) -> str:
    endings = [ending for ending in ENDINGS if path.name.endswith(ending)] if path.is_file() else []
    return path.name.removesuffix(endings[0]) if endings else path.name


def _read(task: TextTask, name: str, path: Path, limit: int | None, option: str) -> Corpus:
    try:
        examples = task.corpus(path, limit)
    except UserError as error:
        raise UserError(f"{option}{error}") from error
    unknown = _share_unknown(task, examples)
    if unknown > _MOST_UNKNOWN:
        warn(
            f"{path}: the run's tokenizer does not know {unknown:.0%} of its tokens, so that its perplexity says little"
        )
    return Corpus(name, path, examples, unknown)


def _share_unknown(task: TextTask, examples: CleanBatch) -> float:
    if task.vocabulary.unknown_id is None:
        return 0.0
    text = examples.x0[examples.answer_mask(task.tokens.eos_id)]
    return float((text == task.vocabulary.unknown_id).double().mean())


@dataclass(frozen=True)
class Generation:
    """Samples to be drawn, who judges them, and what that model says of real text."""

    task: TextTask
    scorer: Scorer
    samples: Samples
    decode: DecodeConfig
    reference: Quality

    def __call__(self, model: Denoiser, update: Callable[[int], None] | None = None) -> Quality:
        tokens = sample(model, self.task, self.samples, self.decode, update=update)
        return of_samples(self.task, self.scorer, self.samples, tokens)


@dataclass(frozen=True)
class TextMeasures:
    """All that `eval.zero_shot` and `eval.generative` ask for, read before any training."""

    task: TextTask | None = None
    corpora: list[Corpus] = field(default_factory=list)
    generation: Generation | None = None
    nelbo_draws: int = 1

    @staticmethod
    def of(config: RunConfig, task: Task, model: Denoiser, device: torch.device) -> "TextMeasures":
        """Reads what is asked for.

        Raises:
            UserError: the task is no running text, or something asked for is not there or cannot be used.
        """
        asked = config.eval
        if not asked.zero_shot and asked.generative is None:
            return TextMeasures()
        text = text_task(task, config, "eval.zero_shot" if asked.zero_shot else "eval.generative")
        corpora = read_corpora(text, asked.zero_shot, limit=asked.examples, option="eval.zero_shot=")
        generation = None if asked.generative is None else _generation(config, asked.generative, text, model, device)
        return TextMeasures(text, corpora, generation, asked.nelbo_draws)

    def __call__(self, model: Denoiser) -> dict[str, float]:
        """Values for `metrics.jsonl`, by name."""
        values: dict[str, float] = {}
        if self.task is not None:
            found = zero_shot(model, self.task, self.corpora, nelbo_draws=self.nelbo_draws)
            for name, result in found.items():
                values |= {f"eval/zero_shot/{name}/{key}": value for key, value in result.likelihoods().items()}
        if self.generation is not None:
            values |= {f"eval/{key}": value for key, value in self.generation(model).values().items()}
            values |= {f"eval/real/{key}": value for key, value in self.generation.reference.values().items()}
        return values


def text_task(task: Task, config: RunConfig, option: str) -> TextTask:
    """`task`, which must be running text for what `option` asks for.

    Raises:
        UserError: it is not.
    """
    if not isinstance(task, TextTask):
        raise UserError(
            f"{option}: the task {config.task.name} is no running text, of which this is measured; leave it out"
        )
    return task


def _generation(
    config: RunConfig, asked: GenerativeConfig, task: TextTask, model: Denoiser, device: torch.device
) -> Generation:
    decode = _decode(config, asked.decode, is_causal=model.is_causal)
    check_random(decode, asked.samples, "eval.generative.decode")
    build_decoder(decode, model, task.tokens)  # refuses what the model cannot do
    scorer = Scorer.load(asked.model, device, "eval.generative.model=")
    real = task.validation(asked.samples)
    samples = Samples.from_nothing(real, task.tokens.mask_id, asked.samples)
    return Generation(task, scorer, samples, decode, reference(task, scorer, real))


def _decode(config: RunConfig, changed: dict[str, Any], *, is_causal: bool) -> DecodeConfig:
    settings = drawn(config.decode, is_causal=is_causal).model_dump()
    recipes.merge(settings, recipes.rename_keys(changed), DecodeConfig)
    decode = check_section(DecodeConfig, settings, "eval.generative.decode")
    check_guidance(decode, config.data)
    return decode


def in_words(values: dict[str, float]) -> str:
    """What was measured, for the terminal; begins with a comma unless it is nothing."""
    zero_shot = [f"{key.split('/')[2]} ppl {value:.1f}" for key, value in values.items() if _is_zero_shot_ppl(key)]
    parts = [
        f"{name} {values[f'eval/{key}']:.{digits}f} (real text {values[f'eval/real/{key}']:.{digits}f})"
        for key, name, digits in _SHOWN
        if f"eval/{key}" in values
    ]
    return "".join(f", {part}" for part in [*zero_shot, *parts])


_SHOWN = (
    ("gen_ppl", "generative ppl", 1),
    ("unigram_entropy", "unigram entropy", 2),
    ("distinct_2", "distinct-2", 2),
)


def _is_zero_shot_ppl(key: str) -> bool:
    return key.startswith("eval/zero_shot/") and key.endswith("/ppl")
