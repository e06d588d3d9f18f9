"""The likelihood of text that a model was not trained on: other corpora, as the run's own text is tokenised and cut."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unmask.data.prepare.sources import ENDINGS
from unmask.errors import UserError
from unmask.evaluation.evaluate import Evaluation, evaluate
from unmask.masking.causal import is_answer
from unmask.models.denoiser import Denoiser
from unmask.progress import warn
from unmask.tasks.task import TextTask
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


def zero_shot(
    model: Denoiser, task: TextTask, corpora: Sequence[Corpus], *, nelbo_draws: int, dtype: str
) -> dict[str, Evaluation]:
    """By name. Each is evaluated as held-out rows are, with masks that depend on the row's number alone."""
    return {
        corpus.name: evaluate(model, task, corpus.examples, (), nelbo_draws=nelbo_draws, dtype=dtype)
        for corpus in corpora
    }


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
    text = examples.x0[is_answer(examples, task.tokens.eos_id)]
    return float((text == task.vocabulary.unknown_id).double().mean())
