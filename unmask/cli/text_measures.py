"""What `unmask eval` measures of running text beside its likelihood: other corpora, and samples.

Dimensions: N samples, L positions.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table

from unmask.cli import options, prompts
from unmask.config.run import RunConfig
from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig, check_guidance
from unmask.errors import UserError
from unmask.evaluation.evaluate import Evaluation
from unmask.evaluation.generative import ORDERS, Quality, Samples, check_random, drawn, reference
from unmask.evaluation.judge import Scorer
from unmask.evaluation.text import Corpus, Generation, read_corpora, text_task, zero_shot
from unmask.models.denoiser import Denoiser
from unmask.progress import progress
from unmask.tasks.task import Task, TextTask
from unmask.types import CleanBatch

_SAMPLES = 64


@dataclass(frozen=True)
class TextOptions:
    """What was typed."""

    corpora: list[Path]
    generative: str | None
    samples: int | None
    prompts: str | None
    decoder: list[str]

    def check(self, task: Task, config: RunConfig) -> TextTask | None:
        """The task, where anything is asked for.

        Raises:
            UserError: it is no running text, or an option goes with another that is not there.
        """
        for option, value in (("--samples", self.samples), ("--prompts", self.prompts)):
            if value is not None and self.generative is None:
                raise UserError(f"{option} {value}: goes with --generative FOLDER, which scores the samples; add it")
        if self.generative is not None and len(self.decoder) > 1:
            raise UserError(f"--decoder: {len(self.decoder)} are given, but samples are drawn in one way; give one")
        if not self.corpora and self.generative is None:
            return None
        return text_task(task, config, "--corpus" if self.corpora else "--generative")

    def decode_config(self, config: RunConfig, *, is_causal: bool) -> DecodeConfig:
        """How samples are drawn."""
        decode = drawn(config.decode, is_causal=is_causal)
        for text in self.decoder:
            decode = options.parse_decoder(text, decode)
        check_guidance(decode, config.data)
        return decode

    def start(self, task: TextTask, real: CleanBatch, decode: DecodeConfig) -> Samples:
        """From nothing; or every prompt, once unless --samples says more."""
        if self.prompts is None:
            number = self.samples or _SAMPLES
            check_random(decode, number, "--decoder")
            return Samples.from_nothing(real, task.tokens.mask_id, number)
        number, asked = self.samples or 1, prompts.read(task, self.prompts)
        check_random(decode, number, "--decoder")
        rows = list(asked.rows(number, number * len(asked.canvases)))
        return Samples(rows[0].canvases, rows[0].keys)


@dataclass(frozen=True)
class TextWork:
    """What there is to do, all of it read and checked."""

    task: TextTask
    corpora: list[Corpus]
    generation: Generation | None
    prompts: str | None

    @staticmethod
    def of(
        asked: TextOptions,
        task: TextTask,
        model: Denoiser,
        decode: DecodeConfig,
        *,
        limit: int,
        data: CleanBatch | None,
    ) -> "TextWork":
        """Reads and checks what is asked for.

        Args:
            limit: rows of a corpus.
            data: real text to hold samples against; None for the run's held-out rows.

        Raises:
            UserError: something is not there, or cannot be used.
        """
        corpora = read_corpora(task, asked.corpora, limit=limit, option="--corpus ")
        if asked.generative is None:
            return TextWork(task, corpora, None, None)
        build_decoder(decode, model, task.tokens)  # refuses what the model cannot do
        real = task.validation(asked.samples or _SAMPLES) if data is None else data
        samples = asked.start(task, real, decode)
        scorer = Scorer.load(asked.generative, next(model.parameters()).device, "--generative ")
        found = reference(task, scorer, real[: len(samples.keys)])
        return TextWork(task, corpora, Generation(task, scorer, samples, decode, found), asked.prompts)

    def do(self, model: Denoiser, *, nelbo_draws: int) -> "TextFound":
        others = zero_shot(model, self.task, self.corpora, nelbo_draws=nelbo_draws)
        if self.generation is None:
            return TextFound(self, others, None)
        with progress("Sampling", len(self.generation.samples.keys)) as update:
            return TextFound(self, others, self.generation(model, update))


@dataclass(frozen=True)
class TextFound:
    work: TextWork
    zero_shot: dict[str, Evaluation]
    samples: Quality | None

    def as_dict(self) -> dict[str, Any]:
        """`zero_shot`, by corpus, and `generative`, as far as they were asked for."""
        zero_shot = {corpus.name: self._of_corpus(corpus) for corpus in self.work.corpora}
        return ({"zero_shot": zero_shot} if zero_shot else {}) | self._generative()

    def _of_corpus(self, corpus: Corpus) -> dict[str, Any]:
        likelihoods = self.zero_shot[corpus.name].likelihoods()
        about = {"data": str(corpus.path), "examples": len(corpus.examples), "unknown_share": corpus.unknown}
        return likelihoods | about

    def _generative(self) -> dict[str, Any]:
        generation = self.work.generation
        if generation is None or self.samples is None:
            return {}
        missing = {"gen_ppl": None, "gen_ppl_stderr": None}
        named = {"samples": self.samples, "real": generation.reference}
        found = {name: missing | each.values() | each.counts for name, each in named.items()}
        decoder = {generation.decode.label: generation.decode.model_dump(mode="json")}
        how = {"model": generation.scorer.about(), "decoder": decoder, "prompts": self.work.prompts}
        return {"generative": found | how}

    def write(self, target: TextIO) -> None:
        """A JSON line for each sample."""
        for number, record in enumerate([] if self.samples is None else self.samples.records):
            target.write(json.dumps({"sample": number} | record) + "\n")

    def print(self) -> None:
        out = options.results()
        if self.zero_shot:
            out.print(_zero_shot_table(self.work.corpora, self.zero_shot))
        if self.samples is not None and self.work.generation is not None:
            out.print(
                f"Samples drawn by {self.work.generation.decode.label}, under {self.work.generation.scorer.name}:"
            )
            out.print(_generative_table({"samples": self.samples, "real text": self.work.generation.reference}))


def _zero_shot_table(corpora: list[Corpus], found: dict[str, Evaluation]) -> Table:
    first = next(iter(found.values()))
    at_most = "" if first.is_exact else " ≤"
    table = _table("other text", "rows", f"{first.likelihood}, nats", f"perplexity{at_most}", f"bits per byte{at_most}")
    for corpus in corpora:
        result = found[corpus.name]
        assert result.nelbo is not None, "text is known"
        assert result.text is not None, "it is text"
        nelbo = f"{result.nelbo.value:.4f} ± {result.nelbo.stderr:.4f}"
        ppl, bits = f"{result.text.ppl:.2f}", f"{result.text.bits_per_byte:.3f}"
        table.add_row(corpus.name, str(len(corpus.examples)), nelbo, ppl, bits)
    return table


def _generative_table(found: dict[str, Quality]) -> Table:
    orders = ", ".join(map(str, ORDERS))
    table = _table("", "rows", "perplexity", "entropy, nats", f"distinct-{orders}")
    for name, own in found.items():
        ppl = "no text" if own.ppl is None else f"{own.ppl:.2f} ± {own.ppl_stderr:.2f}"
        shares = " / ".join(f"{own.distinct[n]:.3f}" for n in ORDERS)
        table.add_row(name, str(own.counts["rows"]), ppl, f"{own.unigram_entropy:.3f}", shares)
    return table


def _table(first: str, *others: str) -> Table:
    table = Table()
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table
