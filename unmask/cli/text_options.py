"""The options of `unmask eval` for models of text."""

from dataclasses import dataclass

from unmask.cli import options, prompts
from unmask.config.run import GenerativeConfig, RunConfig
from unmask.decoding.config import DecodeConfig, check_guidance
from unmask.errors import UserError
from unmask.evaluation.generative import Samples, check_random, sampling_config
from unmask.evaluation.text import Generation, TextMeasures, check_text_task, read_corpora, read_question_sets
from unmask.models.denoiser import Denoiser
from unmask.tasks.task import Task, TextTask
from unmask.training.loading import LoadedRun
from unmask.training.protocol import EvalOptions
from unmask.types import CleanBatch

SAMPLES: int = GenerativeConfig.model_fields["samples"].default


@dataclass(frozen=True)
class TextOptions:
    """The options for text, and `--decoder`."""

    asked: EvalOptions

    def check(self, task: Task, config: RunConfig) -> TextTask | None:
        """Returns the task if any option for running text is given.

        Raises:
            UserError: it is not running text, or an option needs another that is not given.
        """
        if self.asked.draws is not None and not self.asked.questions:
            raise UserError(
                f"--draws {self.asked.draws}: goes with --task multiple_choice or --questions; a likelihood takes "
                "eval.nelbo_draws"
            )
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
        self, loaded: LoadedRun, text: TextTask | None, model: Denoiser, decode: DecodeConfig, real: CleanBatch | None
    ) -> TextMeasures:
        """Reads and checks the corpora, questions, prompts and the scoring model.

        Args:
            loaded: the run.
            text: what `check` returned.
            model: the run's model, as it computes.
            decode: settings that samples are drawn with.
            real: real text to score beside the samples; None: the run's held-out rows.
        """
        settings, asked = loaded.config.eval, self.asked
        questions = read_question_sets(
            loaded.task,
            model,
            asked.questions,
            limit=asked.examples,
            draws=asked.draws or settings.choice_draws,
            option="--questions ",
        )
        if text is None:
            return TextMeasures(questions=questions)
        limit = asked.examples or settings.examples
        corpora = read_corpora(text, asked.corpus, limit=limit, option="--corpus ")
        return TextMeasures(corpora, questions, self._generation(text, model, decode, real))

    def _generation(
        self, task: TextTask, model: Denoiser, decode: DecodeConfig, real: CleanBatch | None
    ) -> Generation | None:
        if self.asked.generative is None:
            return None
        real = task.validation(self.asked.samples or SAMPLES) if real is None else real
        return Generation.prepare(
            model,
            task,
            self.asked.generative,
            self._samples(task, real, decode),
            decode,
            real=real,
            option="--generative ",
            prompts=self.asked.prompts,
        )

    def _samples(self, task: TextTask, real: CleanBatch, decode: DecodeConfig) -> Samples:
        if self.asked.prompts is None:
            number = self.asked.samples or SAMPLES
            check_random(decode, number, "--decoder")
            return Samples.from_nothing(real, task.tokens.mask_id, number)
        number, read = self.asked.samples or 1, prompts.read(task, self.asked.prompts)
        check_random(decode, number, "--decoder")
        (rows,) = read.rows(number, number * len(read.canvases))
        return Samples(rows.canvases, rows.keys)
