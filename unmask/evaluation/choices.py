"""The accuracy of multiple choice: the choice with the highest likelihood, by itself or per character.

Dimensions: none; questions and choices are lists.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from unmask.data.fingerprint import file_sha256
from unmask.data.vocabulary import Vocabulary
from unmask.errors import UserError
from unmask.evaluation.accuracy import Accuracy
from unmask.evaluation.continuations import NUM_DRAWS, Pair, Score, count_rows, fit_context, score_pairs
from unmask.evaluation.statistics import root_mean_square
from unmask.models.denoiser import Denoiser
from unmask.tasks.choices import Question, read_questions
from unmask.tasks.task import Task
from unmask.tasks.text_rows import TextRows

LABEL = "likelihood"

_SEED = 0  # of the masks


@dataclass(frozen=True)
class PairEncoder:
    """Encodes contexts and continuations as ids of a model.

    Attributes:
        vocabulary: the model's.
        start: what stands before every text.
        mask_id: the mask, which no text may hold.
    """

    vocabulary: Vocabulary
    start: tuple[int, ...]
    mask_id: int

    @classmethod
    def of(cls, task: Task) -> "PairEncoder":
        """Returns the encoder of a model's task.

        Raises:
            UserError: the task is not of text.
        """
        if not isinstance(task, TextRows):
            raise UserError("the likelihood of a text needs a model of text, of conversations, or an imported one")
        return cls(task.vocabulary, tuple(task.start_ids), task.tokens.mask_id)

    def encode(self, context: str, continuation: str, key: int | None = None) -> Pair:
        """Encodes the context, and what the whole text has beyond its tokens; spaces between them go to the latter.

        That is the way of lm-evaluation-harness. Where nothing stands before the text, that is an end token.

        Args:
            context: the text that is given.
            continuation: the text that is scored.
            key: keys the masks; default: a hash of the context.
        """
        stripped = context.rstrip()
        continuation, context = context[len(stripped) :] + continuation, stripped
        whole, before = self.vocabulary.encode(context + continuation), self.vocabulary.encode(context)
        given = (*self.start, *before) or (self.vocabulary.eos_id,)
        return Pair(given, tuple(whole[len(before) :]), text_key(context) if key is None else key)


def text_key(text: str) -> int:
    """Returns a number that is the text's own, in [0, 2^62)."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8]) >> 2


@dataclass(frozen=True)
class QuestionSet:
    """The questions of a file, encoded for a model.

    Attributes:
        name: names the set in results.
        path: the file.
        questions: what is asked.
        encoded: the pairs of each question, which all have the same key.
        length: positions of a row, at most.
        draws: masks of each choice, at most.
    """

    name: str
    path: Path
    questions: list[Question]
    encoded: list[list[Pair]]
    length: int
    draws: int

    @staticmethod
    def read(
        path: Path, task: Task, model: Denoiser, *, name: str, limit: int | None = None, draws: int = NUM_DRAWS
    ) -> "QuestionSet":
        """Reads the first `limit` questions of a file (default: all), and encodes them for the model of a task.

        Raises:
            UserError: the task is not of text; or the file cannot be read, or holds something (named, with its line)
                that the model cannot be asked.
        """
        try:
            encoder, length = PairEncoder.of(task), task.tokens.length
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        questions = read_questions(path)[:limit]
        encoded = [[encoder.encode(each.context, choice) for choice in each.choices] for each in questions]
        for question, pairs in zip(questions, encoded, strict=True):
            for number, pair in enumerate(pairs):
                try:
                    fit_context(model, pair, length)
                except ValueError as error:
                    shown = question.choices[number].strip()[:40]
                    raise UserError(f"{question.place}: choice {number}, {shown!r}: {error}") from error
        return QuestionSet(name, path, questions, encoded, length, draws)

    @property
    def chance(self) -> float:
        """The accuracy to expect of a choice at random."""
        return sum(1 / len(each.choices) for each in self.questions) / len(self.questions)

    @cached_property
    def sha256(self) -> str:
        """The checksum of the file."""
        return file_sha256(self.path)

    def count_rows(self, model: Denoiser) -> int:
        """Counts the rows that `answer` reads, at most."""
        return count_rows(model, (pair for pairs in self.encoded for pair in pairs), self.draws)

    def answer(self, model: Denoiser, update: Callable[[int], None] | None = None) -> "Answered":
        """Answers the questions; calls `update` with the number of rows that are done, of `count_rows`."""
        accuracy = answer_questions(
            model, self.questions, self.encoded, length=self.length, draws=self.draws, update=update
        )
        return Answered(self, accuracy)

    def protocol(self, model: Denoiser) -> dict[str, Any]:
        """Returns what the answers depend on beside the model's weights, as JSON values."""
        return {
            "data": str(self.path),
            "data_sha256": self.sha256,
            "examples": len(self.questions),
            "draws": self.draws,
            "seed": _SEED,
            "likelihood": how_scored(model),
        }


@dataclass(frozen=True)
class Answered:
    """The answers to a set of questions."""

    questions: QuestionSet
    accuracy: Accuracy

    def values(self) -> dict[str, float | None]:
        """Returns the figures by name."""
        own = self.accuracy
        shares = {measure: (share, own.stderr_of(measure)) for measure, share in own.shares.items()}
        return {
            key: value
            for measure, (share, stderr) in shares.items()
            for key, value in ((measure, share), (f"{measure}_stderr", stderr))
        } | {"chance": self.questions.chance, "examples": own.n}

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures, and what they depend on, as JSON values."""
        about = {"data": str(self.questions.path), "loglikelihood_stderr": mean_stderr(self.accuracy)}
        return self.values() | about


def how_scored(model: Denoiser) -> str:
    """Describes in words how the likelihood of a choice is computed."""
    if model.is_causal:
        return "exact"
    if model.block_size == 1:
        return "exact, token by token"
    return (
        "bound under uniform masks of the choice (all of them where they are no more than the draws), the same masks "
        "for all choices of a question"
    )


def answer_questions(
    model: Denoiser,
    questions: Sequence[Question],
    encoded: Sequence[Sequence[Pair]],
    *,
    length: int,
    draws: int = NUM_DRAWS,
    update: Callable[[int], None] | None = None,
) -> Accuracy:
    """Answers the questions.

    `accuracy`: the right choice has the highest log-likelihood; `acc_norm`: per character of its text, without the
    space before it, as lm-evaluation-harness does. Of equal ones the first counts. Arguments as in `score_pairs`.
    """
    flat = [pair for pairs in encoded for pair in pairs]
    scores = score_pairs(model, flat, length=length, draws=draws, seed=_SEED, update=update)
    rest = iter(scores)
    records = [
        record_choice(question, [next(rest) for _ in pairs]) for question, pairs in zip(questions, encoded, strict=True)
    ]
    n = len(records)
    shares = {measure: sum(record[measure] for record in records) / n for measure in ("accuracy", "acc_norm")}
    return Accuracy(shares, sum(record["nfe"] for record in records) / n, n, records)


def record_choice(question: Question, scores: Sequence[Score]) -> dict[str, Any]:
    """Describes the answer to a question as a JSON object: what was chosen, and why."""
    values = [score.value for score in scores]
    sizes = [max(1, len(choice.strip())) for choice in question.choices]
    per_character = [value / size for value, size in zip(values, sizes, strict=True)]
    chosen, chosen_norm = values.index(max(values)), per_character.index(max(per_character))
    return {
        "context": question.context,
        "choices": list(question.choices),
        "answer": question.answer,
        "chosen": chosen,
        "loglikelihood": values,
        "stderr": [score.stderr for score in scores],
        "accuracy": chosen == question.answer,
        "acc_norm": chosen_norm == question.answer,
        "nfe": sum(score.passes for score in scores),
    }


def mean_stderr(accuracy: Accuracy) -> float | None:
    """Returns the root mean square of the log-likelihoods' standard errors; None if one is unknown."""
    return root_mean_square([error for record in accuracy.records for error in record["stderr"]])
