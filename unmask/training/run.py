"""A run: training steps with everything around them, from a configuration to a folder."""

import math
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from types import FrameType
from typing import Any

import torch

from unmask.config import RunConfig
from unmask.decoding.build import build_decoder
from unmask.errors import RunFailed, UserError
from unmask.evaluation.along import TextMeasures, in_words
from unmask.evaluation.evaluate import Evaluation, evaluate
from unmask.progress import console, warn
from unmask.tasks.build import build_task, is_graded, keep_files
from unmask.training import checkpoint, trackers, warm_start
from unmask.training.background import Background
from unmask.training.bad_numbers import BadStep, Watch
from unmask.training.folder import RunFolder, describe_environment, read_environment
from unmask.training.logger import Board, StepDisplay
from unmask.training.metrics import MetricsFile
from unmask.training.trainer import StepReport, Trainer

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):
    """The run was asked to stop, has saved, and can be resumed."""


class _EvaluationLeft(Exception):
    """A stop was requested during an evaluation."""


@dataclass
class Progress:
    """What a run knows of itself beside the trainer's state; saved with it."""

    step: int = 0
    seconds: float = 0.0
    """Of training: evaluation and saving apart."""
    metrics_position: int = 0
    """How long `metrics.jsonl` was."""
    skips: int = 0
    """Steps whose update was left out, because their numbers were bad."""
    evaluated_step: int = 0
    """The last one; a run that was stopped when an evaluation was due owes it."""
    best_step: int | None = None
    best_score: float = -math.inf
    best_nelbo: float = math.inf

    def is_better(self, score: float, nelbo: float) -> bool:
        """By accuracy; where that is equal (0, early on or always), by NELBO."""
        return (score, -nelbo) > (self.best_score, -self.best_nelbo)


def evaluated_weights(config: RunConfig) -> list[str]:
    """`ema` counts only where there is an average."""
    return [name for name in config.eval.weights if name == "raw" or config.ema.decay] or ["raw"]


def rate(weights: str, decoder: str) -> str:
    """What the share of examples solved is called in `metrics.jsonl`, by weights and `DecodeConfig.label`."""
    return f"eval/accuracy/{weights}/{decoder}"


def rates(config: RunConfig) -> list[str]:
    """All shares that the evaluations of a run will write; `eval/accuracy` repeats the first. None of running text."""
    if not is_graded(config):
        return []
    labels = [decoder.label for decoder in config.eval.decoders(config.decode)]
    return [rate(weights, label) for weights in evaluated_weights(config) for label in labels]


def _in_words(result: Evaluation) -> str:
    assert result.nelbo is not None, "held-out examples are known"
    shown = ", ".join(f"{label} {measured.accuracy:.1%}" for label, measured in result.accuracy.items())
    text = "" if result.text is None else f", {result.text.bits_per_byte:.3f} bits per byte"
    accuracy = f"accuracy {shown}; " if shown else ""
    return f"{accuracy}{result.likelihood} {result.nelbo.value:.4f} nats{text}"


class Run:
    """Trains as `config` says, into `folder`."""

    def __init__(self, config: RunConfig, folder: RunFolder, *, title: str = "train") -> None:
        self.config = config
        self.folder = folder
        self.title = title
        self.task = build_task(config)
        self.rank: int | None = None
        self.stop_requested = False
        self.is_stepping = False
        self.saved_step = 0
        self.whole_step: int | None = None
        """Of the newest checkpoint that is known to be on the disk."""
        self.saving = Background()

    def train(self, *, resume: bool = False) -> None:
        """Trains to the last step.

        Raises:
            UserError: wrong settings, data or folder.
            RunFailed: a disk is full, or numbers are bad; what was saved is whole.
            Interrupted: SIGINT, SIGTERM or SIGUSR1 came; the step was finished and saved.
        """
        with self._signals():
            self._train(resume=resume)

    def _train(self, *, resume: bool) -> None:
        if self.config.train.threads is not None:
            torch.set_num_threads(self.config.train.threads)
        trackers.check(self.config.log.to)
        self.folder.check(self.config, resume=resume)
        self.trainer = Trainer(self.config, self.task.tokens, self.task.train_stream(self.config.train.seed))
        known = read_environment(self.folder.path).get("attention") if resume else None
        environment = describe_environment(
            self.trainer.device, dtype=self.trainer.dtype, is_compiled=self.trainer.is_compiled
        ) | {"attention": known}
        self.examples = self.task.validation(self.config.eval.examples)
        self._check_model()
        self.text_measures = TextMeasures.of(self.config, self.task, self.trainer.model, self.trainer.device)
        if not (resume and checkpoint.steps(self.folder.checkpoints)):
            self._start_warm()
        try:
            self.folder.open(self.config, environment, warn, resume=resume)
            keep_files(self.task, self.folder.path)
            self.progress = self._restore(resume)
            self._compile(known)
            self.folder.note(environment | {"attention": self.trainer.attention})
            self._loop()
        except OSError as error:
            raise RunFailed(f"{error}. The run stops; {self._what_is_left()}") from error
        finally:
            self.folder.close()

    def _what_is_left(self) -> str:
        if self.whole_step is None:
            return "it has no checkpoint yet. When this is mended, start again with --resume"
        return f"its newest checkpoint is of step {self.whole_step}. When this is mended, continue with --resume"

    def _check_model(self) -> None:
        """Whether the model can be trained on these examples, and evaluated as asked: before any work is done."""
        model = self.trainer.model
        for decoder in self.config.eval.decoders(self.config.decode) if is_graded(self.config) else ():
            build_decoder(decoder, model, self.task.tokens)
        if model.alignment == "next" and not self.examples.prompt_mask[:, 0].all():
            raise UserError(
                "model.alignment=next predicts a token from what is before it, but position 0 of an example is to be "
                "predicted; use alignment=same, or data with a prompt"
            )

    def _compile(self, attention: str | None) -> None:
        """Before the first step, so that no step's time holds it. `attention`: what the run had chosen."""
        if self.trainer.is_compiled:
            started = time.perf_counter()
            with console.status(f"{self.title}  compiling the training step .."):
                self.trainer.choose_attention(attention)
                self.trainer.warm_up()
            console.print(f"{self.title}  compiled in {time.perf_counter() - started:.0f} s")

    def _restore(self, resume: bool) -> Progress:
        """From the newest whole checkpoint if there is one; else from the start."""
        path = checkpoint.newest(self.folder.checkpoints, warn) if resume else None
        checkpoint.set_aside(self.folder.checkpoints, after=-1 if path is None else checkpoint.step_of(path))
        if path is not None:
            state = checkpoint.load(path)
            self.trainer.load_state_dict(state)
            self.saved_step = self.whole_step = self.trainer.step_number
            console.print(f"Resuming {self.folder.path} from step {self.saved_step}")
            return Progress(**state["progress"])
        if resume:
            console.print(f"No complete checkpoint in {self.folder.path}: starting at step 0")
            self._start_warm()
        return Progress()

    def _start_warm(self) -> None:
        if self.config.train.init is not None:
            model = self.trainer.model
            self.trainer.load_weights(warm_start.read(self.config.train.init, self.task, self.config.model, model))

    def _loop(self) -> None:
        progress, config = self.progress, self.config
        with self._opened(), StepDisplay(self.title, progress.step, self.trainer.num_steps) as display:
            self._evaluate_if_owed()
            while not (self._is_over() or self.stop_requested):
                report = self._timed_step(display)
                self._refuse(self.watch.add(progress.step, report))
                if self._is_due(config.log.every):
                    self._log_step(report, display)
                is_best = self._evaluate_if_owed()
                if is_best or self.stop_requested or self._is_due(config.train.checkpoint_every):
                    self._save()
            if self.saved_step != progress.step:  # the signal came after the last look
                self._save()
        if not self._is_over() or self._owes_evaluation():
            raise Interrupted(f"stopped after step {progress.step}; continue with --resume")

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """All that steps write to; at the end, what is still being saved is waited for."""
        self.metrics = MetricsFile(self.folder.metrics, self.progress.metrics_position, self._head())
        self.boards = [*self._boards()]
        self.watch = Watch(self.rank)
        self.is_stepping = True
        try:
            yield
            self.saving.wait()
        finally:
            self.is_stepping = False
            self.saving.join()
            self.metrics.close()
            for board in self.boards:
                board.close()

    def _boards(self) -> Iterator[Board | trackers.Tracker]:
        log, path = self.config.log, self.folder.path
        if log.tensorboard:
            yield Board(path / "tensorboard", self.progress.step)
        if log.to:
            own = trackers.identity(path)
            config = self.config.model_dump(mode="json")
            about = trackers.About(project=log.project, name=path.name, id=own, folder=path, config=config)
            yield from (trackers.Tracker(name, about) for name in log.to)

    def _is_over(self) -> bool:
        """Whether all steps are done, or one of the budgets is spent."""
        train, progress = self.config.train, self.progress
        return (
            progress.step >= self.trainer.num_steps
            or (train.max_seconds is not None and progress.seconds >= train.max_seconds)
            or (train.max_examples is not None and self.trainer.process.examples_seen >= train.max_examples)
        )

    def _is_due(self, every: int) -> bool:
        """What is due every so many steps, and at the end."""
        return self.progress.step % every == 0 or self._is_over()

    def _timed_step(self, display: StepDisplay) -> StepReport:
        self.saving.check()
        started = time.perf_counter()
        report = self.trainer.step()
        self.progress.seconds += time.perf_counter() - started
        self.progress.step = self.trainer.step_number
        display.step(self.progress.step, self.progress.seconds / self.progress.step)
        return report

    def _log_step(self, report: StepReport, display: StepDisplay) -> None:
        self._refuse(self.watch.settle())
        values = {**report.metrics(), **self.trainer.process.metrics()}
        if self.config.train.on_bad_numbers == "skip":
            values["train/skips"] = self.progress.skips
        self._log(values)
        display.loss(self.progress.step, values["train/loss"])

    def _refuse(self, bad_steps: Iterable[BadStep]) -> None:
        """Steps with bad numbers have changed nothing; goes on after them if that is asked for."""
        train, progress = self.config.train, self.progress
        for bad in bad_steps:
            message = f"{bad}; its batch is in {bad.keep(self.folder.path)}"
            if train.on_bad_numbers == "stop" or progress.skips >= train.max_skips:
                raise RunFailed(f"{message}. {self._how_to_go_on()}")
            progress.skips += 1
            warn(f"{message}. Skipped, number {progress.skips} of at most {train.max_skips}")

    def _how_to_go_on(self) -> str:
        start = f"train.init={self.folder.path} and a lower optim.lr or train.dtype=float32"
        if self.progress.skips:
            return f"That is one more than train.max_skips={self.config.train.max_skips}: start a new run, with {start}"
        return f"Go on without such steps with --resume train.on_bad_numbers=skip, or start a new run with {start}"

    def _head(self) -> dict[str, Any]:
        """How far the run has come: the first keys of every line of `metrics.jsonl`."""
        progress = self.progress
        return {
            "step": progress.step,
            "seconds": progress.seconds,
            "examples_seen": self.trainer.process.examples_seen,
        }

    def _log(self, values: dict[str, Any]) -> None:
        self.metrics.write(self._head() | values)
        for board in self.boards:
            board.write(self.progress.step, values)

    def _owes_evaluation(self) -> bool:
        """Whether one is due after this step, and has not been made."""
        step = self.progress.step
        is_new = step not in (0, self.progress.evaluated_step)
        return is_new and self._is_due(self.config.eval.every)

    def _evaluate_if_owed(self) -> bool:
        """Returns whether this is the best so far. A stop that is requested meanwhile leaves it to the resumed run."""
        if not self._owes_evaluation():
            return False
        self._refuse(self.watch.settle())

        def leave_if_stopped(*_: object) -> None:
            if self.stop_requested:
                raise _EvaluationLeft

        hook = self.trainer.model.backbone.register_forward_pre_hook(leave_if_stopped)
        try:
            return self._evaluate()
        except _EvaluationLeft:
            return False
        finally:
            hook.remove()

    def _evaluate(self) -> bool:
        """Evaluates all weights asked for, and logs; returns whether this is the best so far."""
        results = {name: self._evaluate_weights(name) for name in evaluated_weights(self.config)}
        headline = next(iter(results.values()))
        score = next((measured.accuracy for measured in headline.accuracy.values()), 0.0)
        assert headline.nelbo is not None, "held-out examples are known"
        values = {f"eval/{name}": value for name, value in headline.likelihoods().items()}
        if headline.accuracy:
            values["eval/accuracy"] = score
        for name, result in results.items():
            assert result.nelbo is not None, "the same examples"
            values[f"eval/nelbo/{name}"] = result.nelbo.value
            for label, measured in result.accuracy.items():
                values[rate(name, label)] = measured.accuracy
        with self.trainer.weights(next(iter(results))):
            values |= self.text_measures(self.trainer.model, self.trainer.dtype)
        self._log(values)
        console.print(f"{self.title}  step {self.progress.step}: {_in_words(headline)}{in_words(values)}")
        progress = self.progress
        progress.evaluated_step = progress.step
        if not progress.is_better(score, headline.nelbo.value):
            return False
        progress.best_step = progress.step
        progress.best_score, progress.best_nelbo = score, headline.nelbo.value
        return True

    def _evaluate_weights(self, name: str) -> Evaluation:
        with self.trainer.weights(name):
            return evaluate(
                self.trainer.model,
                self.task,
                self.examples,
                self.config.eval.decoders(self.config.decode),
                nelbo_draws=self.config.eval.nelbo_draws,
                dtype=self.trainer.dtype,
            )

    def _save(self) -> None:
        """Takes a copy of all that matters, which is written while training goes on."""
        self._refuse(self.watch.settle())
        self.saving.wait()  # at most one copy at a time
        progress = self.progress
        progress.metrics_position = self.metrics.position
        state = checkpoint.snapshot(self.trainer.state_dict() | {"progress": asdict(progress)})
        self.saving.start(partial(self._write, progress.step, state, progress.best_step))
        self.saved_step = progress.step

    def _write(self, step: int, state: dict[str, Any], best_step: int | None) -> None:
        train, folder = self.config.train, self.folder.checkpoints
        self.metrics.sync()
        checkpoint.save(folder, step, state)
        self.whole_step = step
        best = set() if best_step is None else {best_step}
        checkpoint.prune(folder, keep_last=train.keep_last, keep_every=train.keep_every, keep=best)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and SIGUSR1 end the run after the step, or before the first one; a second Ctrl-C at once."""

        def request_stop(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and (self.stop_requested or not self.is_stepping):
                raise KeyboardInterrupt
            self.stop_requested = True
            if not self.is_stepping:
                raise Interrupted("stopped before the first step; start again with --resume")
            console.print("Stopping after this step, then saving (Ctrl-C again to stop at once)")

        before = {number: signal.signal(number, request_stop) for number in _STOPS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
