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
from typing import Any

from unmask.tasks.programs.inside.jail import SandboxLimits
from unmask.tasks.programs.inside.server import READY

_GRACE = 5.0
"""Seconds that a supervisor may take beyond the program's own before the whole server is ended."""
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from inside import server; del sys.path[0]; server.main(sys.argv[2])"
)
_OPTIONS = ("-P", "-s", "-S", "-W", "ignore")  # -I, but that it would ignore our hash seed
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # some interpreters do not start without


class Worker:
    """A server process that runs one program at a time; another is started if a program manages to end it.

    Raises:
        RuntimeError: no server can be started.
    """

    _process: subprocess.Popen[bytes]
    _read: bytes
    deadline: float

    def __init__(self, limits: SandboxLimits) -> None:
        self._limits = limits
        self._job = -1
        self._start()

    def fileno(self) -> int:
        """Returns the descriptor that is readable when `poll` has a report."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def submit(self, source: str) -> None:
        """Sends a program to run; `poll` returns its report."""
        assert self._process.stdin is not None
        self._job += 1
        self.deadline = time.monotonic() + self._limits.seconds + _GRACE
        with suppress(OSError):  # a dead server shows when its report is read
            rest = memoryview(json.dumps([self._job, source]).encode() + b"\n")
            while rest:
                rest = rest[self._process.stdin.write(rest) :]

    def poll(self) -> dict[str, Any] | None:
        """Returns the report of the program, or None if there is none yet. Does not wait."""
        if not wait([self.fileno()], 0):
            return self._restart({"reply": "", "code": None}) if time.monotonic() >= self.deadline else None
        part = os.read(self.fileno(), 65536)
        if not part:
            return self._restart({"reply": "", "code": 1})
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
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _restart(self, report: dict[str, Any]) -> dict[str, Any]:
        self._kill()
        self.close()
        self._start()
        return report

    def _start(self) -> None:
        self._read = b""
        with tempfile.TemporaryDirectory(prefix="unmask-") as folder:
            self._process = self._popen(folder)
            try:
                assert self._process.stdout is not None
                if self._process.stdout.readline() != READY:
                    raise RuntimeError(f"{sys.executable}: the sandbox does not start (its messages are above)")
            except BaseException:
                self._kill()
                self.close()
                raise
        # The folder that the server stays in is gone by now: nothing can be made in it, and nothing is left of it.

    def _popen(self, folder: str) -> subprocess.Popen[bytes]:
        arguments = (str(Path(__file__).parent), json.dumps(asdict(self._limits)))
        return subprocess.Popen(
            [sys.executable, *_OPTIONS, "-c", _START, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
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
