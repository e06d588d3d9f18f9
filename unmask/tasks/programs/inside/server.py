"""A server that forks one program after another: starting an interpreter for each would take ten times as long.

Three generations: this server; per program a supervisor, which holds the clock and outlives the program; the program.
A job comes as a line on stdin, `[number, source]`; its report goes to stdout as a line. When stdin closes all end.
"""

import gc
import json
import os
import select
import signal
import sys
import time
from contextlib import suppress
from typing import Any, NoReturn

from . import jail, kernel, program
from .jail import SandboxLimits

READY = b"ready\n"
MAX_REPLY = 16384
"""Most bytes of a program's reply; a longer one is unreadable."""


def main(arguments: str) -> None:
    """Serves until stdin closes. `arguments`: the `SandboxLimits` as JSON."""
    limits = SandboxLimits(**json.loads(arguments))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and closes stdin
    os.environ.clear()
    with suppress(OSError):
        kernel.die_with_parent()
    jail.isolate(limits)
    with suppress(OSError):
        kernel.hide_memory()
    gc.freeze()  # so that no collection in a program copies our pages
    os.write(1, READY)
    while line := sys.stdin.buffer.readline():
        _run(json.loads(line), limits)


def _run(job: tuple[int, str], limits: SandboxLimits) -> None:
    number, source = job
    pid = os.fork()
    if pid == 0:
        _supervise(number, source, limits)
    if os.waitpid(pid, 0)[1] != 0:
        _write_report(number, reply="", code=0)  # it was killed before it could report


def _supervise(number: int, source: str, limits: SandboxLimits) -> NoReturn:
    status = 1
    try:
        deadline = time.monotonic() + limits.seconds
        for prepare in (kernel.die_with_parent, kernel.adopt_orphans):
            with suppress(OSError):
                prepare()
        pid, pipe = _start(source, limits)
        code = None
        try:
            reply = _listen(pipe, deadline)
            code = _wait(pid, deadline)
        finally:
            _end(pid, is_over=code is not None)
        _write_report(number, reply.decode("utf-8", "replace"), code)
        status = 0
    finally:
        os._exit(status)


def _start(source: str, limits: SandboxLimits) -> tuple[int, int]:
    pipe, output = os.pipe()
    jail.isolate_children(limits)
    pid = os.fork()
    if pid == 0:
        try:
            program.run(source, limits, output)
        finally:
            os._exit(1)
    os.close(output)
    return pid, pipe


def _listen(pipe: int, deadline: float) -> bytes:
    """Reads the program's reply, until it closes the pipe, writes too much, or the deadline passes."""
    reply = b""
    while len(reply) <= MAX_REPLY and (left := deadline - time.monotonic()) > 0:
        ready = select.select([pipe, 0], [], [], left)[0]
        if 0 in ready:  # between jobs nothing comes but the end
            raise EOFError
        if ready:
            part = os.read(pipe, 65536)
            if not part:
                break
            reply += part
    return reply


def _wait(pid: int, deadline: float) -> int | None:
    """Waits for the program's exit code (negative: the signal that ended it); None if it still runs at the deadline."""
    pause = 0.0001
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        if select.select([0], [], [], pause)[0]:
            raise EOFError
        pause = min(2 * pause, 0.01)


def _end(pid: int, is_over: bool) -> None:
    """Ends the program, its group, and whatever has become ours since; returns after the last is gone."""
    with suppress(OSError):
        os.killpg(pid, signal.SIGKILL)
    if not is_over:
        os.kill(pid, signal.SIGKILL)
    while True:
        for child in _find_children():
            with suppress(OSError):
                os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _find_children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:  # noqa: PTH123 (pathlib would be one import more)
            return [int(child) for child in file.read().split()]
    except OSError:
        return []


def _write_report(number: int, reply: str, code: int | None) -> None:
    """Writes the report of a job. `code` is the program's exit code as of a subprocess; None if it had to be ended."""
    report: dict[str, Any] = {"number": number, "reply": reply, "code": code}
    os.write(1, json.dumps(report).encode() + b"\n")
