"""A run: training steps with everything around them, from a configuration to a folder."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

import torch

from unmask.config import RunConfig
from unmask.decoding.build import build_decoder
from unmask.errors import UserError
from unmask.evaluation.evaluate import Evaluation, EvaluationLeft, evaluate
from unmask.peers import ALONE, Peers
from unmask.progress import console, warn
from unmask.section import flatten
from unmask.tasks.build import build_task, is_graded, keep_files
from unmask.training import checkpoint, warm_start
from unmask.training.distributed import check_alike
from unmask.training.folder import RunFolder, describe_environment, read_environment
from unmask.training.logger import Board, MetricsFile, StepDisplay
from unmask.training.parallel import check_parallel
from unmask.training.trainer import StepReport, Trainer


class Interrupted(Exception):
    """The run was asked to stop, has saved, and can be resumed."""


@dataclass
class Progress:
    """What a run knows of itself beside the trainer's state; saved with it."""

    step: int = 0
    seconds: float = 0.0
    """Of training: evaluation and saving apart."""
    metrics_position: int = 0
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
    """Trains as `config` says, into `folder`, which the main one of several processes alone writes."""

    def __init__(self, config: RunConfig, folder: RunFolder, *, title: str = "train", peers: Peers = ALONE) -> None:
        self.config = config
        self.folder = folder
        self.title = title
        self.peers = peers
        with peers.agreed():
            check_parallel(config.train, peers)
            self.task = build_task(config)
        self.stop_requested = False
        self.saved_step = 0

    def train(self, *, resume: bool = False, restart_pool: bool = False) -> None:
        """Trains to the last step.

        Args:
            resume: go on from the newest whole checkpoint.
            restart_pool: there, with a new pool, of other examples.

        Raises:
            UserError: wrong settings, data or folder.
            Interrupted: SIGINT, SIGTERM or SIGUSR1 came to one of the processes; the step was finished and saved.
        """
        if self.config.train.threads is not None:
            torch.set_num_threads(self.config.train.threads)
        with self.peers.agreed():
            stream = self.task.train_stream(self.config.train.seed)
            self.examples = self.task.validation(self.config.eval.examples)
            if self.peers.is_main:
                self.folder.check(self.config, resume=resume)
        self._check_alike(stream.epoch_size, resume=resume, restart_pool=restart_pool)
        self.trainer = Trainer(self.config, self.task.tokens, stream, self.peers)
        known = read_environment(self.folder.path).get("attention") if resume else None
        environment = describe_environment(
            self.trainer.device,
            dtype=self.trainer.dtype,
            is_compiled=self.trainer.is_compiled,
            processes=self.peers.size,
        ) | {"attention": known}
        with self.peers.agreed():
            self._check_model()
        if not self._from_main(resume and bool(checkpoint.steps(self.folder.checkpoints))):
            self._start_warm()
        try:
            with self.peers.agreed():
                self._open_folder(environment, resume)
            self.progress = self._restore(resume, restart_pool)
            self._compile(known)
            if self.peers.is_main:
                self.folder.note(environment | {"attention": self.trainer.attention})
            self._loop()
        finally:
            self.folder.close()

    def _from_main(self, value: Any) -> Any:
        """What the main process says, whose folder counts. JSON can hold it."""
        return self.peers.exchange(value)[0]

    def _check_alike(self, epoch_size: int, **options: bool) -> None:
        settings = dict(flatten(self.config.model_dump(mode="json")))
        found = {"examples of data": epoch_size, "fingerprint of data": self.task.tokens.fingerprint}
        check_alike(self.peers, {**settings, **options, **found, "torch": torch.__version__})

    def _open_folder(self, environment: dict[str, Any], resume: bool) -> None:
        if self.peers.is_main:
            self.folder.open(self.config, environment, warn, resume=resume)
            keep_files(self.task, self.folder.path)

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

    def _restore(self, resume: bool, restart_pool: bool) -> Progress:
        """From the newest whole checkpoint if there is one; else from the start."""
        step = self._from_main(self._newest_step() if resume and self.peers.is_main else None)
        if step is not None:
            with self.peers.agreed():
                state = self._load(step, restart_pool)
            with self.peers.agreed():
                self.trainer.load_state_dict(state)
            self.saved_step = self.trainer.step_number
            console.print(f"Resuming {self.folder.path} from step {self.saved_step}")
            return Progress(**state["progress"])
        if resume:
            console.print(f"No complete checkpoint in {self.folder.path}: starting at step 0")
            self._start_warm()
        return Progress()

    def _newest_step(self) -> int | None:
        """That of the newest whole checkpoint; those that are not whole are set aside."""
        path = checkpoint.newest(self.folder.checkpoints, warn)
        step = None if path is None else checkpoint.step_of(path)
        checkpoint.set_aside(self.folder.checkpoints, after=-1 if step is None else step)
        return step

    def _load(self, step: int, restart_pool: bool) -> dict[str, Any]:
        try:
            state = checkpoint.load(self.folder.checkpoints / f"step_{step:08d}")
        except FileNotFoundError as error:
            raise UserError(
                f"{self.folder.path}: the main process has a checkpoint of step {step} here, this one has not: "
                f"{error}; put the run where all processes see it"
            ) from error
        if restart_pool:
            restarted = getattr(self.trainer.process, "restarted", None)
            if restarted is None:
                raise UserError("--restart-pool: this run's process has no pool; leave it out")
            state["process"] = restarted(state["process"])
            console.print("The pool is restarted: its rows are dropped, and new examples take their place")
        return state

    def _start_warm(self) -> None:
        init, model = self.config.train.init, self.trainer.model
        if init is not None:
            with self.peers.agreed():
                weights = warm_start.read(init, self.task, self.config.model, model)
            self.trainer.load_weights(weights)

    def _loop(self) -> None:
        progress, config = self.progress, self.config
        if self.peers.is_main:
            self.metrics = MetricsFile(self.folder.metrics, progress.metrics_position)
        has_board = config.log.tensorboard and self.peers.is_main
        self.board = Board(self.folder.path / "tensorboard", progress.step) if has_board else None
        with self._signals(), StepDisplay(self.title, progress.step, self.trainer.num_steps) as display:
            self._heard = self.peers.vote(self._votes)
            self._evaluate_if_owed()
            while not (self._is_over() or self._must_stop):
                asked = self.peers.vote(self._votes)
                report = self._timed_step(display)
                self._heard = asked
                if self._is_due(config.log.every):
                    self._log_step(report, display)
                if self._owes_evaluation():
                    self._check_finite(report)
                is_best = self._evaluate_if_owed()
                if is_best or self._must_stop or self._is_due(config.train.checkpoint_every):
                    self._save(report)
            if self.saved_step != progress.step:  # the signal came after the last look
                self._save(report)
        if self.peers.is_main:
            self.metrics.close()
        if self.board is not None:
            self.board.close()
        if not self._is_over() or self._owes_evaluation():
            raise Interrupted(f"stopped after step {progress.step}; continue with --resume")

    def _votes(self) -> list[float]:
        """What this process alone knows, and all must act on at one step: a signal came; the main one's time is up."""
        limit = self.config.train.max_seconds
        is_late = self.peers.is_main and limit is not None and self.progress.seconds >= limit
        return [float(self.stop_requested), float(is_late)]

    @property
    def _must_stop(self) -> bool:
        return self._heard()[0] > 0

    def _is_over(self) -> bool:
        """Whether all steps are done, or one of the budgets is spent."""
        limit = self.config.train.max_examples
        return (
            self.progress.step >= self.trainer.num_steps
            or self._heard()[1] > 0
            or (limit is not None and self.trainer.process.examples_seen >= limit)
        )

    def _is_due(self, every: int) -> bool:
        """What is due every so many steps, and at the end."""
        return self.progress.step % every == 0 or self._is_over()

    def _timed_step(self, display: StepDisplay) -> StepReport:
        started = time.perf_counter()
        report = self.trainer.step()
        self.progress.seconds += time.perf_counter() - started
        self.progress.step = self.trainer.step_number
        display.step(self.progress.step, self.progress.seconds / self.progress.step)
        return report

    def _log_step(self, report: StepReport, display: StepDisplay) -> None:
        self._check_finite(report)
        values = {**report.metrics(self.peers), **self.trainer.process.metrics()}
        self._log(values)
        display.loss(self.progress.step, values["train/loss"])

    def _check_finite(self, report: StepReport) -> None:
        """Before anything of a run that has diverged is kept."""
        loss, norm = report.loss.item(), report.grad_norm.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {self.progress.step}: the loss is {loss}, the gradient's norm {norm}. The last checkpoint is "
                f"from before that: start from it in a new folder, with train.init={self.folder.path} and a lower "
                "optim.lr or train.dtype=float32"
            )

    def _log(self, values: dict[str, Any]) -> None:
        progress = self.progress
        head = {"step": progress.step, "seconds": progress.seconds, "examples_seen": self.trainer.process.examples_seen}
        if self.peers.is_main:
            self.metrics.write(head | values)
        if self.board is not None:
            self.board.write(progress.step, values)

    def _owes_evaluation(self) -> bool:
        """Whether one is due after this step, and has not been made."""
        step = self.progress.step
        is_new = step not in (0, self.progress.evaluated_step)
        return is_new and self._is_due(self.config.eval.every)

    def _evaluate_if_owed(self) -> bool:
        """Returns whether this is the best so far. A stop that is requested meanwhile leaves it to the resumed run."""
        if not self._owes_evaluation():
            return False

        def leave_if_stopped(*_: object) -> None:
            if self.stop_requested:
                self.peers.tell_stop()
            if self.stop_requested or self.peers.is_stop_told():
                raise EvaluationLeft

        hook = self.trainer.model.backbone.register_forward_pre_hook(leave_if_stopped)
        try:
            return self._evaluate()
        except EvaluationLeft:
            return False
        finally:
            hook.remove()
            self._heard = self.peers.vote(self._votes)  # if this was left, then at this step

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
        self._log(values)
        console.print(f"{self.title}  step {self.progress.step}: {_in_words(headline)}")
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
                peers=self.peers,
            )

    def _save(self, report: StepReport) -> None:
        self._check_finite(report)
        progress, train = self.progress, self.config.train
        self.saved_step = progress.step
        state = self.trainer.state_dict()
        if not self.peers.is_main:
            return
        progress.metrics_position = self.metrics.synced_position()
        checkpoint.save(self.folder.checkpoints, progress.step, state | {"progress": asdict(progress)})
        best = set() if progress.best_step is None else {progress.best_step}
        checkpoint.prune(self.folder.checkpoints, keep_last=train.keep_last, keep_every=train.keep_every, keep=best)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGUSR1 end the run after the step; a second SIGINT ends it at once."""

        def request_stop(number: int, frame: FrameType | None) -> None:
            if self.stop_requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_requested = True
            console.print("Stopping after this step, then saving (Ctrl-C again to stop at once)")

        asking = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, request_stop) for number in asking}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
