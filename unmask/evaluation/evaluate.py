"""The evaluation of a model: likelihood, accuracy of each decoder, and measures of text, in one result.

`unmask eval` and the evaluations of training print and save this same object.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from unmask.decoding.config import DecodeConfig
from unmask.errors import NotFinite
from unmask.evaluation.accuracy import Accuracy, grade_answers
from unmask.evaluation.choices import Answered
from unmask.evaluation.generative import NGRAM_SIZES
from unmask.evaluation.nelbo import Estimate, Likelihood, measure_likelihood, summarise
from unmask.evaluation.text import Generative, TextMeasures, ZeroShot, zero_shot
from unmask.models.denoiser import Denoiser
from unmask.peers import ALONE, Peers
from unmask.tasks.task import GradedTask, Task
from unmask.types import CleanBatch


class EvaluationLeft(Exception):
    """Raised by a hook of the model to leave an evaluation; all processes leave it if one does."""


@dataclass(frozen=True)
class Cells:
    """A table of text, for the terminal or a page; its first column names the rows."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True)
class Evaluation:
    """The results of one model on one set of examples."""

    likelihood: Likelihood | None
    """None if the answers are not known as tokens."""
    accuracy: dict[str, Accuracy] = field(default_factory=dict)
    """By decoder label (`DecodeConfig.label`), in the order asked for; empty for tasks that cannot grade."""
    zero_shot: dict[str, ZeroShot] = field(default_factory=dict)
    """By corpus."""
    multiple_choice: dict[str, Answered] = field(default_factory=dict)
    """By file of questions."""
    generative: Generative | None = None

    @property
    def nelbo(self) -> float | None:
        """Nats per maskable token, if there is a likelihood; the best step of a run without accuracy has the lowest."""
        return None if self.likelihood is None else self.likelihood.estimate.value

    @property
    def score(self) -> float:
        """The first decoder's accuracy, 0 without one; a run's best step has the highest (and nan is never best)."""
        return next((measured.accuracy for measured in self.accuracy.values()), 0.0)

    @property
    def not_graded(self) -> dict[str, int]:
        """Answers that the machine could not grade, and that count in no share: by decoder, where there are any."""
        return {label: measured.not_graded for label, measured in self.accuracy.items() if measured.not_graded}

    def say_not_graded(self) -> str | None:
        """Says which answers could not be graded; None if all were."""
        if not self.not_graded:
            return None
        parts = [f"{count} of {count + self.accuracy[label].n} ({label})" for label, count in self.not_graded.items()]
        why = Counter(
            str(record.get("output"))
            for label in self.not_graded
            for record in self.accuracy[label].records
            if record.get("accuracy", 0) is None
        )
        reason = "".join(f": {text}" for text, _ in why.most_common(1))
        return f"the machine could not grade {', '.join(parts)} answers, which count in no share{reason}"

    def values(self) -> dict[str, float | None]:
        """Returns all figures for `metrics.jsonl`, by name without the prefix `eval/`."""
        found = {} if self.likelihood is None else self.likelihood.values()
        if self.accuracy and not math.isnan(self.score):
            found["accuracy"] = self.score
        for name, other in self.zero_shot.items():
            found |= {f"zero_shot/{name}/{key}": value for key, value in other.likelihood.values().items()}
        for name, answered in self.multiple_choice.items():
            found |= {f"multiple_choice/{name}/{key}": value for key, value in answered.values().items()}
        return found | ({} if self.generative is None else self.generative.values())

    def as_dict(self) -> dict[str, Any]:
        """Returns the results as JSON, for `unmask eval --json`."""
        accuracy, likelihood = self.accuracy, {} if self.likelihood is None else self.likelihood.values()
        return {
            **({"nelbo": None, "nelbo_stderr": None} | likelihood),
            "accuracy": {label: measured.accuracy for label, measured in accuracy.items()},
            "accuracy_stderr": {label: measured.stderr for label, measured in accuracy.items()},
            "interval": {label: list(measured.interval) for label, measured in accuracy.items()},
            "shares": {label: measured.shares for label, measured in accuracy.items()},
            "shares_interval": {
                label: {name: list(ends) for name, ends in measured.intervals.items()}
                for label, measured in accuracy.items()
            },
            "reasons": {label: measured.reasons for label, measured in accuracy.items() if measured.reasons},
            **({"not_graded": self.not_graded} if self.not_graded else {}),
            **({"groups": groups} if (groups := self._groups()) else {}),
            "nfe": {label: measured.nfe for label, measured in accuracy.items()},
            **({"zero_shot": {name: own.as_dict() for name, own in self.zero_shot.items()}} if self.zero_shot else {}),
            **({"multiple_choice": choices} if (choices := self._choices()) else {}),
            **({} if self.generative is None else {"generative": self.generative.as_dict()}),
        }

    def _choices(self) -> dict[str, dict[str, Any]]:
        return {name: answered.as_dict() for name, answered in self.multiple_choice.items()}

    def _groups(self) -> dict[str, dict[str, Any]]:
        return {
            label: {
                name: {"accuracy": own.accuracy, "interval": list(own.interval), "examples": own.n}
                for name, own in measured.groups.items()
            }
            for label, measured in self.accuracy.items()
            if measured.groups
        }

    def records(self) -> Iterator[dict[str, Any]]:
        """Yields a record of each answer, then of each question and each sample."""
        for label, measured in self.accuracy.items():
            for number, record in enumerate(measured.records):
                yield {"example": number, "decoder": label} | record
        for name, answered in self.multiple_choice.items():
            for number, record in enumerate(answered.accuracy.records):
                yield {"question": number, "set": name} | record
        for number, record in enumerate([] if self.generative is None else self.generative.samples.records):
            yield {"sample": number} | record

    def words(self) -> str:
        """Returns the main figures in one line."""
        parts = []
        if self.likelihood is not None:
            parts = [f"{self.likelihood.name} {self.nelbo:.4f} nats"]
            if self.likelihood.text is not None:
                parts.append(f"{self.likelihood.text.bits_per_byte:.3f} bits per byte")
        for name, other in self.zero_shot.items():
            parts += [f"{name} ppl {text.ppl:.1f}"] if (text := other.likelihood.text) is not None else []
        for name, answered in self.multiple_choice.items():
            parts.append(f"{name} {answered.accuracy.text('accuracy')} (chance {answered.questions.chance:.0%})")
        parts += [] if self.generative is None else self.generative.words()
        shown = ", ".join(f"{label} {measured.text('accuracy')}" for label, measured in self.accuracy.items())
        return (f"accuracy {shown}; " if shown else "") + ", ".join(parts)

    def lines(self) -> Iterator[str | Cells]:
        """Yields lines and tables with all figures."""
        if self.accuracy:
            yield self._accuracy_table()
        if self._groups():
            yield self._group_table()
        for label, measured in self.accuracy.items():
            if measured.reasons:
                yield f"{label}: " + ", ".join(f"{count} {reason}" for reason, count in measured.reasons.items())
            if measured.not_graded:
                yield f"{label}: {measured.not_graded} of {measured.n + measured.not_graded} not graded"
        if self.likelihood is not None:
            own = self.likelihood
            yield f"{own.name} {own.estimate.text('.4f')} nats per maskable token"
            if own.text is not None:
                bound = "" if own.is_exact else " at most"
                ppl, bits = f"{own.text.ppl:.2f} per token", f"{own.text.bits_per_byte:.3f} bits per byte"
                yield f"Perplexity{bound} {ppl} (rows: {own.text.rows});{bound} {bits}"
        if self.zero_shot:
            yield self._zero_shot_table()
        if self.multiple_choice:
            yield self._choice_table()
        if self.generative is not None:
            generation = self.generative.generation
            yield f"Samples drawn by {generation.decode.label}, under {generation.scorer.name}:"
            yield self._generative_table(self.generative)

    def _accuracy_table(self) -> Cells:
        measures = list(next(iter(self.accuracy.values())).shares)
        rows: list[Sequence[str]] = []
        for label, measured in self.accuracy.items():
            rows.append((label, *map(measured.text, measures), f"{measured.nfe:.1f}"))
        return Cells(("decoder", f"{measures[0]} [95 %]", *measures[1:], "NFE"), rows)

    def _group_table(self) -> Cells:
        found = [measured.groups for measured in self.accuracy.values()]
        rows = [
            (name, str(own.n), *(groups[name].text("accuracy") if name in groups else "" for groups in found))
            for name, own in found[0].items()
        ]
        return Cells(("group", "examples", *self.accuracy), list(rows))

    def _zero_shot_table(self) -> Cells:
        rows: list[Sequence[str]] = []
        for name, other in self.zero_shot.items():
            own, text = other.likelihood, other.likelihood.text
            assert text is not None, "another corpus is text"
            size, ppl, bits = len(other.corpus.examples), f"{text.ppl:.2f}", f"{text.bits_per_byte:.3f}"
            rows.append((name, str(size), own.estimate.text(".4f"), ppl, bits))
        first = next(iter(self.zero_shot.values())).likelihood
        at_most = "" if first.is_exact else " ≤"
        header = ("other text", "rows", f"{first.name}, nats", f"perplexity{at_most}", f"bits per byte{at_most}")
        return Cells(header, rows)

    def _choice_table(self) -> Cells:
        measures = list(next(iter(self.multiple_choice.values())).accuracy.shares)
        rows: list[Sequence[str]] = []
        for name, answered in self.multiple_choice.items():
            own = answered.accuracy
            rows.append((name, str(own.n), *map(own.text, measures), f"{answered.questions.chance:.1%}"))
        return Cells(("multiple choice", "questions", *measures, "by chance"), rows)

    def _generative_table(self, found: Generative) -> Cells:
        rows: list[Sequence[str]] = []
        for name, own in {"samples": found.samples, "real text": found.generation.real}.items():
            ppl = "no text" if own.ppl is None else Estimate(own.ppl, own.ppl_stderr).text(".2f")
            shares = " / ".join(f"{own.distinct[n]:.3f}" for n in NGRAM_SIZES)
            rows.append((name, str(own.counts["rows"]), ppl, f"{own.unigram_entropy:.3f}", shares))
        sizes = ", ".join(map(str, NGRAM_SIZES))
        return Cells(("", "rows", "perplexity", "entropy, nats", f"distinct-{sizes}"), rows)


@contextmanager
def _raise_together(peers: Peers) -> Iterator[None]:
    """Raises `EvaluationLeft` or `NotFinite` of any process in all of them."""
    problem = None
    with peers.raise_together(EvaluationLeft):
        try:
            yield
        except NotFinite as error:
            problem = error
    with peers.raise_together(NotFinite):
        if problem is not None:
            raise problem


def evaluate(
    model: Denoiser,
    task: Task,
    examples: CleanBatch,
    decoders: Sequence[DecodeConfig],
    *,
    nelbo_draws: int,
    text: TextMeasures | None = None,
    update: Callable[[int], None] | None = None,
    peers: Peers = ALONE,
) -> Evaluation:
    """Evaluates in eval mode, and leaves the model in the mode it had. `peers` share the examples. Collective.

    Calls `update` with the number done of `len(examples) x len(decoders)` answers and of `text.count_work(model)`.

    Raises:
        NotFinite: the model gives numbers that are not finite.
    """

    def count_from(start: int) -> Callable[[int], None] | None:
        return None if update is None else lambda done: update(start + done)

    was_training = model.training
    model.eval()
    try:
        with _raise_together(peers):  # no communication inside: processes need not be in step
            rows = None
            if examples.is_known(task.tokens.mask_id):
                rows = measure_likelihood(model, task, examples, draws=nelbo_draws, share=peers.share)
            graded = {}
            if isinstance(task, GradedTask):
                for number, config in enumerate(decoders):
                    report, share = count_from(number * len(examples)), peers.share
                    graded[config.label] = grade_answers(model, task, examples, config, share=share, update=report)
        likelihood = None if rows is None else summarise(rows, model, task, examples, peers)
        accuracy = {label: own.over_all(peers) for label, own in graded.items()}
        if text is None:
            return Evaluation(likelihood, accuracy)
        with _raise_together(peers):  # every process measures all of it
            others = zero_shot(model, text.corpora, nelbo_draws=nelbo_draws)
            done, answered = len(graded) * len(examples), {}
            for questions in text.questions:
                answered[questions.name] = questions.answer(model, count_from(done))
                done += questions.count_rows(model)
            drawn = None if text.generation is None else text.generation.draw(model, count_from(done))
        return Evaluation(likelihood, accuracy, others, answered, drawn)
    finally:
        model.train(was_training)
