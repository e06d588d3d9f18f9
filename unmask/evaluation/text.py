"""Measures of running text beside the likelihood of held-out rows: other corpora, and samples under another model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmask.config import recipes
from unmask.config.run import GenerativeConfig, RunConfig
from unmask.data.fingerprint import examples_digest
from unmask.data.prepare.sources import ENDINGS
from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig, check_guidance
from unmask.errors import UserError
from unmask.evaluation.choices import QuestionSet
from unmask.evaluation.generative import (
    Quality,
    Samples,
    check_random,
    measure_reference,
    measure_samples,
    sample,
    sampling_config,
)
from unmask.evaluation.judge import Scorer
from unmask.evaluation.nelbo import Likelihood, measure_likelihood, summarise
from unmask.models.denoiser import Denoiser
from unmask.paths import existing_file, user_path
from unmask.progress import warn
from unmask.tasks.task import Task, TextTask
from unmask.types import CleanBatch

_MOST_UNKNOWN = 0.05
_IN_WORDS = (
    ("gen_ppl", "generative ppl", 1),
    ("unigram_entropy", "unigram entropy", 2),
    ("distinct_2", "distinct-2", 2),
)


@dataclass(frozen=True)
class Corpus:
    """Text that the model was not trained on, tokenised and cut as the run's own text is."""

    name: str
    path: Path
    task: TextTask
    examples: CleanBatch
    unknown: float
    """The share of its tokens that the tokenizer does not know: they are easy to predict, and lower the perplexity."""

    def protocol(self) -> dict[str, Any]:
        """Returns what it is, as JSON values."""
        digest = examples_digest(self.examples)
        return {"data": str(self.path), "data_sha256": digest, "examples": len(self.examples)}


@dataclass(frozen=True)
class ZeroShot:
    """The likelihood of another corpus."""

    corpus: Corpus
    likelihood: Likelihood

    def as_dict(self) -> dict[str, Any]:
        own = self.corpus
        about = {"data": str(own.path), "examples": len(own.examples), "unknown_share": own.unknown}
        return self.likelihood.values() | about


@dataclass(frozen=True)
class Generation:
    """Samples to be drawn, the model that scores them, and its scores of real text."""

    task: TextTask
    scorer: Scorer
    samples: Samples
    decode: DecodeConfig
    real: Quality
    prompts: str | None = None
    """The file of the prompts; None: samples start from nothing."""

    @staticmethod
    def prepare(
        model: Denoiser,
        task: TextTask,
        folder: str,
        samples: Samples,
        decode: DecodeConfig,
        *,
        real: CleanBatch,
        option: str,
        prompts: str | None = None,
    ) -> "Generation":
        """Loads the scoring model in `folder`, and scores as many rows of `real` text as there are samples.

        Args:
            option: the option or setting that named the folder, for messages.

        Raises:
            UserError: the folder or the real text cannot be used, or the model cannot decode so.
        """
        build_decoder(decode, model, task.tokens)  # refuses early what the model cannot do
        scorer = Scorer.load(folder, next(model.parameters()).device, option)
        reference = measure_reference(task, scorer, real[: len(samples.keys)])
        return Generation(task, scorer, samples, decode, reference, prompts)

    def draw(self, model: Denoiser, update: Callable[[int], None] | None = None) -> "Generative":
        """Draws the samples and scores them; calls `update` with the number drawn."""
        tokens = sample(model, self.task, self.samples, self.decode, update=update)
        return Generative(self, measure_samples(self.task, self.scorer, self.samples, tokens))


@dataclass(frozen=True)
class Generative:
    """The quality of drawn samples."""

    generation: Generation
    samples: Quality

    def values(self) -> dict[str, float]:
        """Returns the figures of the samples, and those of real text under `real/`, by name."""
        real = self.generation.real.values()
        return self.samples.values() | {f"real/{name}": value for name, value in real.items()}

    def as_dict(self) -> dict[str, Any]:
        decode, missing = self.generation.decode, {"gen_ppl": None, "gen_ppl_stderr": None}
        return {
            "samples": missing | self.samples.values() | self.samples.counts,
            "real": missing | self.generation.real.values() | self.generation.real.counts,
            "model": self.generation.scorer.about(),
            "decoder": {decode.label: decode.model_dump(mode="json")},
            "prompts": self.generation.prompts,
        }

    def words(self) -> list[str]:
        own, real = self.samples.values(), self.generation.real.values()
        return [
            f"{name} {own[key]:.{digits}f} (real text {real[key]:.{digits}f})"
            for key, name, digits in _IN_WORDS
            if key in own
        ]


@dataclass(frozen=True)
class TextMeasures:
    """Corpora, questions and samples to evaluate a model of text on, all of them read and checked before any work."""

    corpora: list[Corpus] = field(default_factory=list)
    questions: list[QuestionSet] = field(default_factory=list)
    generation: Generation | None = None

    @staticmethod
    def from_config(config: RunConfig, task: Task, model: Denoiser) -> "TextMeasures | None":
        """Reads what `eval.zero_shot`, `eval.multiple_choice` and `eval.generative` name; None without these settings.

        Raises:
            UserError: the task is not of text, or something is missing or cannot be used.
        """
        settings, corpora, generation = config.eval, [], None
        if settings.zero_shot:
            text = check_text_task(task, config, "eval.zero_shot")
            corpora = read_corpora(text, settings.zero_shot, limit=settings.examples, option="eval.zero_shot=")
        questions = read_question_sets(
            task,
            model,
            settings.multiple_choice,
            limit=settings.examples,
            draws=settings.choice_draws,
            option="eval.multiple_choice=",
        )
        if settings.generative is not None:
            text = check_text_task(task, config, "eval.generative")
            generation = _generation(config, settings.generative, text, model)
        found = TextMeasures(corpora, questions, generation)
        return found if corpora or questions or generation else None

    def protocol(self, model: Denoiser) -> dict[str, Any]:
        """Returns what the figures of corpora and questions depend on beside the model's weights, as JSON values."""
        corpora = {each.name: each.protocol() for each in self.corpora}
        questions = {each.name: each.protocol(model) for each in self.questions}
        return ({"zero_shot": corpora} if corpora else {}) | ({"multiple_choice": questions} if questions else {})

    def count_work(self, model: Denoiser) -> int:
        """Counts the rows that questions take, at most, and the samples."""
        samples = 0 if self.generation is None else len(self.generation.samples.keys)
        return samples + sum(each.count_rows(model) for each in self.questions)


def zero_shot(model: Denoiser, corpora: Sequence[Corpus], *, nelbo_draws: int) -> dict[str, ZeroShot]:
    """Measures the likelihood of each corpus, as of held-out rows; masks depend on the row's number alone."""
    found = {}
    for corpus in corpora:
        rows = measure_likelihood(model, corpus.task, corpus.examples, draws=nelbo_draws)
        found[corpus.name] = ZeroShot(corpus, summarise(rows, model, corpus.task, corpus.examples))
    return found


def check_text_task(task: Task, config: RunConfig, option: str) -> TextTask:
    """Returns `task`, which must be running text for the measure that `option` asks for.

    Raises:
        UserError: it is not.
    """
    if not isinstance(task, TextTask):
        raise UserError(
            f"{option}: the task {config.task.name} is no running text, of which this is measured; leave it out"
        )
    return task


def read_corpora(task: TextTask, paths: Sequence[str | Path], *, limit: int | None, option: str) -> list[Corpus]:
    """Reads each corpus, up to `limit` rows of it.

    Args:
        option: the option or setting that named the paths, for messages.

    Raises:
        UserError: a path does not exist, cannot be read, or holds too little text.
    """
    found = [user_path(path, option) for path in paths]
    for path in found:
        if not path.exists():
            raise UserError(f"{option}{path}: no such file or folder")
    names = names_of(found, option)
    return [_read(task, name, path, limit, option) for name, path in zip(names, found, strict=True)]


def read_question_sets(
    task: Task, model: Denoiser, paths: Sequence[str | Path], *, limit: int | None, draws: int, option: str
) -> list[QuestionSet]:
    """Reads each file of questions, up to `limit` of them.

    Args:
        draws: masks of each choice, at most.
        option: the option or setting that named the paths, for messages.

    Raises:
        UserError: the task is not of text, or a path is no file that the model can be asked the questions of.
    """
    found = [existing_file(path, option) for path in paths]
    sets = []
    for name, path in zip(names_of(found, option), found, strict=True):
        try:
            sets.append(QuestionSet.read(path, task, model, name=name, limit=limit, draws=draws))
        except UserError as error:
            raise UserError(f"{option}{error}") from error
    return sets


def names_of(paths: Sequence[Path], option: str) -> list[str]:
    """Names each path, without its ending, by as many of its last folders as tell the paths apart.

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
    return Corpus(name, path, task, examples, unknown)


def _share_unknown(task: TextTask, examples: CleanBatch) -> float:
    if task.vocabulary.unknown_id is None:
        return 0.0
    text = examples.x0[examples.answer_mask(task.tokens.eos_id)]
    return float((text == task.vocabulary.unknown_id).double().mean())


def _generation(config: RunConfig, settings: GenerativeConfig, task: TextTask, model: Denoiser) -> Generation:
    where, base = "eval.generative.decode", sampling_config(config.decode, is_causal=model.is_causal)
    decode = recipes.updated(base, settings.decode, where)
    check_guidance(decode, config.data)
    check_random(decode, settings.samples, where)
    real = task.validation(settings.samples)
    samples = Samples.from_nothing(real, task.tokens.mask_id, settings.samples)
    return Generation.prepare(model, task, settings.model, samples, decode, real=real, option="eval.generative.model=")
