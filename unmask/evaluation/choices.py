"""The accuracy of multiple choice: the choice with the highest likelihood, by itself or per character.

Dimensions: none; questions and choices are lists.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from unmask.data.vocabulary import Vocabulary
from unmask.errors import UserError
from unmask.evaluation.accuracy import Accuracy
from unmask.evaluation.continuations import DRAWS, Pair, Score, count_rows, score_pairs
from unmask.models.denoiser import Denoiser
from unmask.tasks.choices import Question
from unmask.tasks.task import Task
from unmask.tasks.text_rows import TextRows

LABEL = "likelihood"


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


def encode_questions(encoder: PairEncoder, questions: Sequence[Question]) -> list[list[Pair]]:
    """Encodes the pairs of each question; all of its choices have the same key."""
    return [[encoder.encode(each.context, choice) for choice in each.choices] for each in questions]


def answer_questions(
    model: Denoiser,
    questions: Sequence[Question],
    encoded: Sequence[Sequence[Pair]],
    *,
    length: int,
    draws: int = DRAWS,
    seed: int = 0,
    update: Callable[[int], None] | None = None,
) -> Accuracy:
    """Answers the questions.

    `accuracy`: the right choice has the highest log-likelihood; `acc_norm`: per character of its text, without the
    space before it, as lm-evaluation-harness does. Of equal ones the first counts. Arguments as in `score_pairs`.
    """
    flat = [pair for pairs in encoded for pair in pairs]
    scores = score_pairs(model, flat, length=length, draws=draws, seed=seed, update=update)
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
    errors = [error for record in accuracy.records for error in record["stderr"]]
    return None if None in errors else math.sqrt(sum(error**2 for error in errors) / len(errors))


def count_passes(model: Denoiser, encoded: Sequence[Sequence[Pair]], draws: int) -> int:
    """Counts the rows that `answer_questions` reads, at most."""
    return count_rows(model, (pair for pairs in encoded for pair in pairs), draws)
