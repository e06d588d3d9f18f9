"""What `unmask eval` measures of running text beside its likelihood: other corpora, and samples.

Dimensions: N samples, L positions.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.table import Table

from unmask.cli import options, prompts
from unmask.config import DecodeConfig, RunConfig, check_guidance
from unmask.errors import UserError
from unmask.evaluation.along import Generation, text_task
from unmask.evaluation.evaluate import Evaluation
from unmask.evaluation.generative import ORDERS, Quality, Samples, check_random, drawn, reference
from unmask.evaluation.scorer import Scorer
from unmask.evaluation.zero_shot import Corpus, read_corpora, zero_shot
from unmask.models.denoiser import Denoiser
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

    corpora: list[Corpus] = field(default_factory=list)
    generation: Generation | None = None

    @staticmethod
    def of(
        asked: TextOptions,
        task: TextTask,
        config: RunConfig,
        model: Denoiser,
        *,
        limit: int,
        data: CleanBatch | None,
    ) -> "TextWork":
        """Args:
        limit: rows of a corpus.
        data: real text to hold samples against; None for the run's held-out rows.
        """
        corpora = read_corpora(task, asked.corpora, limit=limit, option="--corpus ")
        if asked.generative is None:
            return TextWork(corpora)
        decode = asked.decode_config(config, is_causal=model.is_causal)
        real = task.validation(asked.samples or _SAMPLES) if data is None else data
        samples = asked.start(task, real, decode)
        scorer = Scorer.load(asked.generative, next(model.parameters()).device, "--generative ")
        found = reference(task, scorer, real[: len(samples.keys)])
        return TextWork(corpora, Generation(task, scorer, samples, decode, found))

    @property
    def num_samples(self) -> int:
        return 0 if self.generation is None else len(self.generation.samples.keys)
