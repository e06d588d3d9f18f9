"""The options of `unmask eval` for running text."""

from dataclasses import dataclass

from unmask.cli import options, prompts
from unmask.config.run import RunConfig
from unmask.decoding.config import DecodeConfig, check_guidance
from unmask.errors import UserError
from unmask.evaluation.generative import Samples, check_random, sampling_config
from unmask.evaluation.text import Generation, TextMeasures, check_text_task, read_corpora
from unmask.models.denoiser import Denoiser
from unmask.tasks.task import Task, TextTask
from unmask.training.protocol import EvalOptions
from unmask.types import CleanBatch

_SAMPLES = 64


@dataclass(frozen=True)
class TextOptions:
    """The options for running text, and `--decoder`."""

    asked: EvalOptions

    def check(self, task: Task, config: RunConfig) -> TextTask | None:
        """Returns the task if any of the options is given.

        Raises:
            UserError: it is not running text, or an option needs another that is not given.
        """
        for option, value in (("--samples", self.asked.samples), ("--prompts", self.asked.prompts)):
            if value is not None and self.asked.generative is None:
                raise UserError(f"{option} {value}: goes with --generative FOLDER, which scores the samples; add it")
        if self.asked.generative is not None and len(self.asked.decoder) > 1:
            raise UserError(
                f"--decoder: {len(self.asked.decoder)} are given, but samples are drawn in one way; give one"
            )
        if not self.asked.corpus and self.asked.generative is None:
            return None
        return check_text_task(task, config, "--corpus" if self.asked.corpus else "--generative")

    def decode_config(self, config: RunConfig, *, is_causal: bool) -> DecodeConfig:
        """Returns the settings that samples are drawn with."""
        decode = sampling_config(config.decode, is_causal=is_causal)
        for text in self.asked.decoder:
            decode = options.parse_decoder(text, decode)
        check_guidance(decode, config.data)
        return decode

    def measures(
        self, task: TextTask, model: Denoiser, decode: DecodeConfig, *, limit: int, real: CleanBatch | None
    ) -> TextMeasures:
        """Reads and checks the corpora, prompts and the scoring model.

        Args:
            limit: rows of a corpus.
            real: real text to score beside the samples; None: the run's held-out rows.
        """
        corpora = read_corpora(task, self.asked.corpus, limit=limit, option="--corpus ")
        if self.asked.generative is None:
            return TextMeasures(task, corpora)
        real = task.validation(self.asked.samples or _SAMPLES) if real is None else real
        generation = Generation.prepare(
            model,
            task,
            self.asked.generative,
            self._samples(task, real, decode),
            decode,
            real=real,
            option="--generative ",
            prompts=self.asked.prompts,
        )
        return TextMeasures(task, corpora, generation)

    def _samples(self, task: TextTask, real: CleanBatch, decode: DecodeConfig) -> Samples:
        if self.asked.prompts is None:
            number = self.asked.samples or _SAMPLES
            check_random(decode, number, "--decoder")
            return Samples.from_nothing(real, task.tokens.mask_id, number)
        number, read = self.asked.samples or 1, prompts.read(task, self.asked.prompts)
        check_random(decode, number, "--decoder")
        (rows,) = read.rows(number, number * len(read.canvases))
        return Samples(rows.canvases, rows.keys)
