"""A run: training steps with logging, evaluation, checkpoints and signals, from a configuration to a folder."""

import math
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import Any

import torch
from rich.text import Text

from unmask import machine
from unmask.config.run import RunConfig
from unmask.config.settings import flatten
from unmask.data.fingerprint import read_fingerprint
from unmask.errors import Interrupted, NotFinite, RunFailed
from unmask.evaluation.evaluate import EvaluationLeft
from unmask.models.lora import has_adapters
from unmask.models.precision import resolve_device
from unmask.peers import ALONE, Peers, Votes
from unmask.progress import console, warn
from unmask.tasks.task import build_task, check_same_data, fingerprint_of, keep_files
from unmask.training import checkpoint, restoring, trackers
from unmask.training.distributed import check_alike, device_of
from unmask.training.evaluating import Evaluator, metrics
from unmask.training.folder import RunFolder, describe_environment, read_environment
from unmask.training.initial import Base
from unmask.training.logging import BadStep, Logger, MetricsFile, NonFiniteMonitor, StepDisplay, open_loggers, way_on
from unmask.training.parallel import check_parallel
from unmask.training.saving import Saver
from unmask.training.state import Progress, check_trained, progress_of
from unmask.training.trainer import StepReport, Trainer, require_memory_for_training

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_STOP = "stop"  # the key by which a process that has received a signal tells the others


class Run:
    """A training of `config` into `folder`, which rank 0 alone writes."""

    def __init__(self, config: RunConfig, folder: RunFolder, *, title: str = "train", peers: Peers = ALONE) -> None:
        self.config = config
        self.folder = folder
        self.title = title
        self.peers = peers
        with peers.raise_together():
            check_parallel(config.train, peers)
            self.task = build_task(config)
            device = resolve_device(device_of(peers, config.train.device))
            require_memory_for_training(config, self.task.tokens, peers, device)
        self.data_changed = self.stop_requested = self.is_stepping = False
        self.saved_step = 0
        self.metrics_file: MetricsFile | None = None  # rank 0's alone
        self.loggers: list[Logger] = []
        # What `train` makes, in this order.
        self.data: dict[str, Any] | None
        self.trainer: Trainer
        self.base: Base | None
        self.saver: Saver
        self.evaluator: Evaluator
        self.progress: Progress
        self.monitor: NonFiniteMonitor
        self._sum_votes: Votes

    def train(self, *, resume: bool = False, restart_pool: bool = False, data_changed: bool = False) -> None:
        """Trains to the last step.

        Args:
            resume: go on from the newest whole checkpoint.
            restart_pool: there, with a new pool, of other examples.
            data_changed: there, with data that need not be those that the run began with.

        Raises:
            UserError: wrong settings, data or folder.
            RunFailed: a disk is full, or numbers are bad; what was saved is whole.
            Interrupted: SIGINT, SIGTERM, SIGHUP or SIGUSR1 came to one of the processes; the step was finished and
                saved.
        """
        self.data_changed = data_changed
        with self._signals():
            self._train(resume=resume, restart_pool=restart_pool)

    def _train(self, *, resume: bool, restart_pool: bool) -> None:
        machine.use_threads(self.config.train.threads)
        with self.peers.raise_together():
            stream = self.task.train_stream(self.config.train.seed)
            examples = self.task.validation(self.config.eval.examples)
            found = fingerprint_of(self.task)
            self.data = None if found is None else asdict(found)
            if self.peers.is_main:
                trackers.check(self.config.log.to)
                self.folder.check(self.config, resume=resume)
                if resume and checkpoint.steps(self.folder.checkpoints):
                    self._check_data(read_environment(self.folder.path).get("data"), "environment.json")
        self._check_alike(stream.epoch_size, resume=resume, restart_pool=restart_pool, data_changed=self.data_changed)
        self.trainer = Trainer(self.config, self.task.tokens, stream, self.peers)
        restoring.warn_of_settings(self.trainer)
        self.saver = Saver(self.folder.checkpoints, self.config.train, self.peers if self.trainer.is_sharded else ALONE)
        with self.peers.raise_together():
            if self.peers.is_main and resume:
                restoring.check_length(self.folder, self.trainer.num_steps)
            self.evaluator = Evaluator(self.config, self.task, examples, self.trainer)
        known = read_environment(self.folder.path).get("attention") if resume else None
        environment = describe_environment(
            self.trainer.device,
            dtype=self.trainer.model.compute_dtype,
            is_compiled=self.trainer.is_compiled,
            processes=self.peers.size,
        ) | {"attention": known, "data": self.data, "evaluates": self.evaluator.about_text()}
        has_checkpoint = self.peers.exchange(resume and bool(checkpoint.steps(self.folder.checkpoints)))[0]
        needs_base = not has_checkpoint or has_adapters(self.trainer.model)
        self.base = restoring.start_warm(self.trainer, self.task) if needs_base else None
        try:
            with self.peers.raise_together():
                if self.peers.is_main:
                    self.folder.open(self.config, resume=resume)
            self.progress = self._restore(resume, restart_pool)
            self._sum_votes = self.peers.async_all_reduce(self._votes)
            is_done = self._is_over() and not self._owes_evaluation()
            self._write_folder(environment, is_done=is_done)  # only now: a refused start leaves the run as it was
            if not is_done:
                self._compile(known)
                if self.peers.is_main:
                    self.folder.write_environment(environment | {"attention": self.trainer.attention})
            self._loop()
        except SystemExit as error:  # from code that does not come with unmask: with 0 it would pass for success
            raise RunFailed(f"a step called sys.exit({error.code!r}). {self.saver.what_is_left()}") from error
        except OSError as error:
            raise RunFailed(f"{str(error) or type(error).__name__}. {self.saver.what_is_left()}") from error
        finally:
            self.folder.close()

    def _check_alike(self, epoch_size: int, **options: bool) -> None:
        settings = dict(flatten(self.config.model_dump(mode="json")))
        found = {"examples of data": epoch_size, "fingerprint of data": self.task.tokens.fingerprint, "data": self.data}
        check_alike(self.peers, {**settings, **options, **found, "torch": torch.__version__})

    def _check_data(self, kept: Any, name: str) -> None:
        """Raises `UserError` if the data are others than the run began with, as its file `name` says."""
        where, fix = self.folder.path, "put the data back as they were, or start another run"
        if not self.data_changed:
            check_same_data(self.task, self.config, read_fingerprint(kept, str(where / name)), where, fix)

    def _write_folder(self, environment: dict[str, Any], *, is_done: bool) -> None:
        with self.peers.raise_together():
            if self.peers.is_main:
                if is_done:
                    restoring.check_done(self.folder, self.config)
                self.folder.write(self.config, None if is_done else environment, warn)
                keep_files(self.task, self.folder.path)

    def _compile(self, attention: str | None) -> None:
        """Compiles before the first step, so that no step's time includes it; `attention` is a resumed run's choice."""
        if self.trainer.is_compiled:
            started = time.perf_counter()
            with console.status(Text(f"{self.title}  compiling the training step ..")):
                self.trainer.choose_attention(attention)
                self.trainer.warm_up()
            console.print(f"{self.title}  compiled in {time.perf_counter() - started:.0f} s")

    def _restore(self, resume: bool, restart_pool: bool) -> Progress:
        """Restores the newest complete checkpoint, or starts at step 0 if there is none."""
        folder, trainer = self.folder.checkpoints, self.trainer
        found = restoring.newest_step(folder) if resume and self.peers.is_main else None
        step = self.peers.exchange(found)[0]  # rank 0's
        if step is not None:
            path = checkpoint.path_of(folder, step)
            with self.peers.raise_together():
                state = restoring.read_state(path, Trainer.PER_PARAMETER if trainer.is_sharded else ())
                self._check_data(state.get("data"), f"checkpoints/{path.name}/state.json")
                progress = progress_of(state, str(path), step)
                if self.base is not None:
                    self.base.check(state.get("base"), str(path))
                state = trainer.read_own(state, str(path))
                if restart_pool:
                    state["process"] = restoring.drop_rows(trainer.process, state["process"])
            with self.peers.raise_together():
                trainer.load_state_dict(state, str(path), is_checked=True)
            self.saved_step = self.saver.whole_step = self.trainer.step_number
            console.print(f"Resuming {self.folder.path} from step {self.saved_step}")
            restoring.warn_of_other_length(trainer, self.folder.before)
            return progress
        if resume:
            console.print(f"No complete checkpoint in {self.folder.path}: starting at step 0")
        return Progress(passes=0.0)

    def _loop(self) -> None:
        progress, config = self.progress, self.config
        with self._open_outputs(), StepDisplay(self.title, progress.step, self.trainer.num_steps) as display:
            self._evaluate_after_resume()
            while not (self._is_over() or self._must_stop):
                # The votes of before the step are summed while it runs, and read after it: no step waits for them, and
                # all processes stop at the same one.
                pending = self.peers.async_all_reduce(self._votes)
                report, bad_steps = self._run_step(display)
                self._sum_votes = pending
                self._handle(bad_steps)
                if self._is_due(config.log.every):
                    self._log_step(report, display)
                is_best = self._evaluate_if_owed()
                if is_best or self._must_stop or self._is_due(config.train.checkpoint_every):
                    self._save()
            if self.saved_step != progress.step:  # the signal came after `_must_stop` was read
                self._save()
        if not self._is_over() or self._owes_evaluation():
            raise Interrupted(f"stopped after step {progress.step}; continue with --resume")
        restoring.warn_of_early_end(self.trainer)

    @contextmanager
    def _open_outputs(self) -> Iterator[None]:
        """Opens everything that steps write to; at the end, waits for the checkpoint that is being saved."""
        head = self.progress.spent(self.trainer.process.examples_seen)
        if self.peers.is_main:
            self.metrics_file = MetricsFile(self.folder.metrics, self.progress.metrics_position, head)
            self.loggers = [*open_loggers(self.config, self.folder.path, self.progress.step)]
        self.monitor = NonFiniteMonitor()
        self.is_stepping = True
        try:
            yield
            self.saver.wait()
        except RuntimeError:
            self.peers.abort()
            raise
        finally:
            self.saver.join()
            if self.metrics_file is not None:
                self.metrics_file.close()
            for logger in self.loggers:
                logger.close()
            self.is_stepping = False  # until here a signal must not cut short what is being written

    def _votes(self) -> list[float]:
        """Returns 1 or 0 for: this process got a signal to stop; rank 0's time is up."""
        limit = self.config.train.max_seconds
        is_late = self.peers.is_main and limit is not None and self.progress.seconds >= limit
        return [float(self.stop_requested), float(is_late)]

    @property
    def _must_stop(self) -> bool:
        return self._sum_votes()[0] > 0

    def _is_over(self) -> bool:
        """True if all steps are done, or one of the budgets is spent."""
        limit = self.config.train.max_examples
        return (
            self.progress.step >= self.trainer.num_steps
            or self._sum_votes()[1] > 0
            or (limit is not None and self.trainer.process.examples_seen >= limit)
        )

    def _is_due(self, every: int) -> bool:
        """True at every multiple of `every` steps, and at the end."""
        return self.progress.step % every == 0 or self._is_over()

    def _run_step(self, display: StepDisplay) -> tuple[StepReport, list[BadStep]]:
        """Takes a step; returns its report, and the steps that are now known to be bad."""
        self.saver.check()
        progress = self.progress
        with progress.count_seconds():  # a GPU only queues the step: it is the monitor that waits for it
            report = self.trainer.step()
            progress.count_step(report.passes)
            bad_steps = self.monitor.add(progress.step, report)
        display.step(progress.step, progress.seconds / progress.step)
        return report, bad_steps

    def _end_step(self) -> None:
        """Waits for the step that is under way, if any."""
        with self.progress.count_seconds():
            bad_steps = self.monitor.collect()
        self._handle(bad_steps)

    def _log_step(self, report: StepReport, display: StepDisplay) -> None:
        self._end_step()
        values = {**report.metrics(self.peers), **self.trainer.process.metrics()}
        if self.config.train.on_bad_numbers == "skip":
            values["train/skips"] = self.progress.skips
        self._log(values)
        display.loss(self.progress.step, values["train/loss"])

    def _handle(self, bad_steps: Iterable[BadStep]) -> None:
        """Writes the batches of bad steps, which have changed no weights; then warns, or ends the run."""
        train, progress = self.config.train, self.progress
        for bad in bad_steps:
            ranks = bad.ranks(self.peers)
            if self.peers.rank in ranks:
                bad.keep(self.folder.path, self.peers)
            message = bad.in_words(self.folder.path, ranks, self.peers)
            if train.on_bad_numbers == "stop" or progress.skips >= train.max_skips:
                raise RunFailed(f"{message}. {way_on(train, self.folder.path, has_checkpoint=self._has_checkpoint())}")
            progress.skips += 1
            warn(f"{message}. Skipped, number {progress.skips} of at most {train.max_skips}")

    def _has_checkpoint(self) -> bool:
        """True if rank 0 has written one; waits for one that is being written. Collective."""
        self.saver.join()
        return self.peers.exchange(self.saver.whole_step)[0] is not None

    def _log(self, values: dict[str, Any]) -> None:
        head = self.progress.spent(self.trainer.process.examples_seen)
        if self.metrics_file is not None:
            self.metrics_file.write(head | values)
        known = {name: value for name, value in values.items() if value is not None}
        for logger in self.loggers:
            logger.write(self.progress.step, known)

    def _owes_evaluation(self) -> bool:
        """True if an evaluation is due after this step and has not been made."""
        step = self.progress.step
        is_new = step not in (0, self.progress.evaluated_step)
        return is_new and self._is_due(self.config.eval.every)

    def _evaluate_if_owed(self) -> bool:
        """Evaluates if that is due; True if the result is the best so far. A signal leaves it to the resumed run."""
        if not self._owes_evaluation():
            return False
        self._end_step()

        def leave_if_stopped() -> None:
            if self.stop_requested:
                self.peers.kv_set(_STOP)
            if self.stop_requested or self.peers.kv_has(_STOP):
                raise EvaluationLeft

        # An evaluation takes minutes: every forward pass looks for a signal, here or in another process.
        self.trainer.model.before_pass = leave_if_stopped
        try:
            return self._evaluate()
        except EvaluationLeft:
            return False
        finally:
            self.trainer.model.before_pass = None
            # New votes: if a signal ended the evaluation, the run stops at this step.
            self._sum_votes = self.peers.async_all_reduce(self._votes)

    def _evaluate_after_resume(self) -> None:
        """Makes the evaluation that a stopped run has left."""
        evaluated = self.progress.evaluated_step
        self._evaluate_if_owed()
        # After the last step no later checkpoint would record it.
        if self._is_over() and self.progress.evaluated_step != evaluated:
            self._save()

    def _evaluate(self) -> bool:
        """Evaluates and logs the result; True if it is the best so far. If the model gives nan, that is unknown."""
        progress = self.progress
        try:
            results = self.evaluator()
        except NotFinite as error:
            progress.evaluated_step = progress.step
            self._log({"eval/nelbo": math.nan})
            warn(f"step {progress.step}: not evaluated: {error}")
            return False
        found = next(iter(results.values()))
        self._log(metrics(results))
        console.print(f"{self.title}  step {progress.step}: {found.words()}")
        if (said := found.say_not_graded()) is not None:
            warn(f"step {progress.step}: {said}")
        progress.evaluated_step = progress.step
        nelbo = math.inf if found.nelbo is None else found.nelbo
        if not progress.is_better(found.score, nelbo):
            return False
        progress.best_step, progress.best_score, progress.best_nelbo = progress.step, found.score, nelbo
        return True

    def _save(self) -> None:
        """Copies the state, which is written while training goes on; ends the run if its weights are not finite."""
        self._end_step()
        state = self.trainer.state_dict() | {"data": self.data}
        with self.peers.raise_together(NotFinite):
            check_trained(state, self.trainer.model.named_parameters(), self.progress.step, self.config.optim.lr)
        self.saved_step = self.progress.step
        if self.base is not None:
            state["base"] = self.base.kept()
        if self.peers.is_main or self.trainer.is_sharded:
            self.saver.save(state, self.progress, self.metrics_file)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Makes a signal of `_STOPS` end the run after the present step; a second Ctrl-C ends it at once."""

        def request_stop(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and (self.stop_requested or not self.is_stepping):
                raise KeyboardInterrupt
            self.stop_requested = True
            if not self.is_stepping:
                raise Interrupted("stopped before the first step; start again with --resume")
            console.print("Stopping after this step, then saving (Ctrl-C again to stop at once)")

        # `nohup` ignores SIGHUP, and so does the run then.
        heard = [each for each in _STOPS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
        before = {number: signal.signal(number, request_stop) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
