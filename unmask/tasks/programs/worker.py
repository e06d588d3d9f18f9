"""The parent's side of a sandbox server."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any

from unmask.tasks.programs.inside.exam import Exam
from unmask.tasks.programs.inside.jail import SandboxLimits
from unmask.tasks.programs.inside.server import READY
from unmask.tasks.programs.inside.watch import find_children

_GRACE = 5.0
"""Seconds that a supervisor may take beyond the program's own before the whole server is ended."""
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from inside import server; del sys.path[0]; server.main(sys.argv[2])"
)
_OPTIONS = ("-P", "-s", "-S", "-W", "ignore")  # -I, but that it would ignore our hash seed
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # some interpreters do not start without


class SandboxFailed(RuntimeError):
    """The sandbox could not be started: the message says why."""


class Worker:
    """A server process that runs one program at a time.

    Attributes:
        is_over: True once a program, or the machine, has ended the server; then this one is of no more use.

    Raises:
        SandboxFailed: no server can be started.
    """

    _process: subprocess.Popen[bytes]
    deadline: float

    def __init__(self, limits: SandboxLimits) -> None:
        self._limits = limits
        self._job = -1
        self._read = b""
        self.is_over = False
        try:
            with tempfile.TemporaryFile() as errors, tempfile.TemporaryDirectory(prefix="unmask-") as folder:
                self._start(folder, errors)
        except OSError as error:
            raise SandboxFailed(f"the sandbox does not start: {error.strerror or error}") from error
        # The folder that the server stays in is gone by now: nothing can be made in it, and nothing is left of it.

    def fileno(self) -> int:
        """Returns the descriptor that is readable when `poll` has a report."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def submit(self, source: str, exam: Exam | None = None) -> None:
        """Sends a program to run, or a solution to examine; `poll` returns its report."""
        assert self._process.stdin is not None
        self._job += 1
        self.deadline = time.monotonic() + self._limits.wall_seconds + _GRACE
        with suppress(OSError):  # a dead server shows when its report is read
            rest = memoryview(json.dumps([self._job, source, None if exam is None else asdict(exam)]).encode() + b"\n")
            while rest:
                rest = rest[self._process.stdin.write(rest) :]

    def poll(self) -> dict[str, Any] | None:
        """Returns the report of the program, or None if there is none yet. Does not wait."""
        if not wait([self.fileno()], 0):
            if time.monotonic() < self.deadline:
                return None
            # A program may stop its supervisor, where no layer forbids that; else the machine is to blame.
            verdict = "asleep" if self._is_stopped() else "clock"
            self._kill()
            return {"verdict": verdict}
        part = os.read(self.fileno(), 65536)
        if not part:
            self._kill()
            return {"code": 1, "is_lost": True}
        self._read += part
        *lines, self._read = self._read.split(b"\n")
        return next((report for report in map(_parse_report, lines) if report.get("number") == self._job), None)

    def close(self) -> None:
        """Ends the server and all it started, and waits for that."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()  # then it ends what it runs, and itself
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._kill()
        except BaseException:
            self._kill()
            raise
        finally:
            self._process.stdout.close()

    def _kill(self) -> None:
        self.is_over = True
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _is_stopped(self) -> bool:
        """True if the server or what it has started has been stopped by a signal."""
        own = self._process.pid
        for pid in (own, *find_children(own)):
            with suppress(OSError):
                if (Path("/proc") / str(pid) / "stat").read_text().rpartition(") ")[2][0] == "T":
                    return True
        return False

    def _start(self, folder: str, errors: IO[bytes]) -> None:
        self._process = self._popen(folder, errors)
        try:
            assert self._process.stdout is not None
            if self._process.stdout.readline() != READY:
                errors.seek(0)
                said = errors.read(100_000).decode(errors="replace").strip().rpartition("\n")[2]
                raise SandboxFailed(f"{sys.executable}: the sandbox does not start" + (f": {said}" if said else ""))
        except BaseException:
            self._kill()
            self.close()
            raise

    def _popen(self, folder: str, errors: IO[bytes]) -> subprocess.Popen[bytes]:
        arguments = (str(Path(__file__).parent), json.dumps(asdict(self._limits)))
        return subprocess.Popen(
            [sys.executable, *_OPTIONS, "-c", _START, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=folder,
            env=_environment(),
            start_new_session=True,
            bufsize=0,
        )


def _parse_report(line: bytes) -> dict[str, Any]:
    """Parses a report; returns an empty one if it is damaged: a supervisor that is killed may leave half a line."""
    try:
        report = json.loads(line)
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}


def _environment() -> dict[str, str]:
    """Makes an environment without the user's variables; a fixed hash seed orders sets: a program has one result."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {"PYTHONHASHSEED": "0"} | kept
