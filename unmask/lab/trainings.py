"""Runs several trainings at once, each in a process of its own with its share of the cores."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from unmask import files, machine
from unmask.config import registry
from unmask.config.run import RunConfig
from unmask.errors import Interrupted, RunFailed, UserError
from unmask.formats import printable
from unmask.training.folder import RunFolder, read_config, schedule_length

_END_OF_LOG = 2000  # bytes


@dataclass(frozen=True)
class Training:
    """The command `unmask train RECIPE SETTINGS --out FOLDER --resume`; its output goes to `FOLDER.log`."""

    recipe: str
    settings: tuple[str, ...]
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def command(self) -> list[str]:
        """Returns the command line; it trusts what this process trusts."""
        # -P: a file in the current folder may have the name of a library's module.
        return [
            *(sys.executable, "-P", str(Path(__file__).with_name("child.py"))),
            *("train", self.recipe, *self.settings, "--out", str(self.folder), "--resume"),
            *["--trust-code"] * registry.trusts_code(),
            *["--follow-links"] * files.follows_links(),
        ]

    def start(self, threads: int, lifeline: int) -> subprocess.Popen[bytes]:
        """Starts the training, with `threads` where neither its recipe nor its settings name `train.threads`.

        It ends when nobody holds the other end of the pipe `lifeline` any longer.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        # A session of its own, so that Ctrl-C reaches only the parent, which passes it on once.
        with files.naming(self.log):
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            own = os.open(self.log, flags, 0o666) if files.follows_links() else files.open_own(self.log, flags)
        with open(own, "ab") as log:  # noqa: PTH123
            return subprocess.Popen(
                self.command(),
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                stdin=lifeline,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def end_of_log(self) -> str:
        """Returns the last lines of its log, for people; empty if there is none yet."""
        if not self.log.is_file():
            return ""
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _END_OF_LOG))
            return printable(log.read(_END_OF_LOG).decode(errors="replace")).strip()


def check_budget(folder: Path, config: RunConfig) -> None:
    """Checks that a training already in `folder`, if any, can go on with `config` as if it had always had it.

    Raises:
        UserError: its budget was larger, or its learning rate has followed a schedule of another length.
    """
    if not RunFolder(folder).exists():
        return
    held = read_config(folder)
    was, now = schedule_length(held), schedule_length(config)
    problem = f"optim.schedule={config.optim.schedule} of {was}, not {now}" if was != now else None
    for key in ("steps", "epochs", "max_seconds", "max_examples"):
        old, new = getattr(held.train, key), getattr(config.train, key)
        if (new or math.inf) < (old or math.inf):
            problem = f"train.{key}={'null' if old is None else old}, not {new}"
    if problem is not None:
        raise UserError(
            f"{folder}: was trained with {problem}, which would make no fair comparison; ask for the same as before, "
            "or name another folder with --out"
        )


_SECONDS_TO_LEAVE = 60.0


class TrainingFailed(RunFailed):
    """A training ended with an error; the message holds the end of its log."""


@contextmanager
def lifeline() -> Iterator[int]:
    """Yields what trainings are started with: they save and stop when this process ends, even if it is killed."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def stop(processes: Collection[subprocess.Popen[bytes]], seconds: float | None = None) -> None:
    """Lets trainings save and stop; kills those that take longer than `seconds` (None: as long as they take)."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    ends = None if seconds is None else time.monotonic() + seconds
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(None if ends is None else max(0.0, ends - time.monotonic()))
        process.kill()
        process.wait()


def train_all(trainings: Sequence[Training], jobs: int, on_tick: Callable[[], None] = lambda: None) -> None:
    """Runs trainings in order, `jobs` at a time; those that are finished already take a moment.

    They save and stop when this process ends, even if it is killed.

    Raises:
        Interrupted: Ctrl-C, SIGTERM or SIGHUP came; all have saved.
        TrainingFailed: one failed; the others were stopped, and have saved.
    """
    threads = max(1, machine.cpus() // jobs)
    waiting = list(trainings)
    running: list[tuple[Training, subprocess.Popen[bytes]]] = []
    # Raises KeyboardInterrupt; what is ignored, as under nohup, stays so.
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = [(number, signal.signal(number, signal.default_int_handler)) for number in numbers]
    patience = time.monotonic() + _SECONDS_TO_LEAVE
    try:
        with lifeline() as line:
            while waiting or running:
                while waiting and len(running) < jobs:
                    # Trainings of a killed comparison may still be saving.
                    if RunFolder(waiting[0].folder).is_held() and time.monotonic() < patience:
                        break
                    training = waiting.pop(0)
                    running.append((training, training.start(threads, line)))
                on_tick()
                time.sleep(0.2)
                polled = [(training, process, process.poll()) for training, process in running]
                for training, _, code in polled:
                    if code:
                        raise TrainingFailed(f"{training.folder} failed (exit code {code}):\n{training.end_of_log()}")
                running = [(training, process) for training, process, code in polled if code is None]
            on_tick()
    except KeyboardInterrupt:
        raise Interrupted("stopped; all trainings have saved, and the same command goes on") from None
    finally:
        for number, handler in before:
            signal.signal(number, handler)
        stop([process for _, process in running])
