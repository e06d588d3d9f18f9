"""A server that forks one program after another: starting an interpreter for each would take ten times as long.

Three generations: this server; per program a supervisor, which watches its time and outlives the program; the program.
A job comes as a line on stdin, `[number, source, exam]`; its report goes to stdout as a line. When stdin closes, all
end.
"""

import gc
import json
import os
import select
import signal
import sys
from contextlib import suppress
from typing import Any, NoReturn

from . import jail, kernel, program
from .exam import Exam
from .jail import SandboxLimits
from .watch import Watch, count_killed_for_memory, find_children

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
    killed = count_killed_for_memory()
    while line := sys.stdin.buffer.readline():
        _run(json.loads(line), limits, killed)


def _run(job: tuple[int, str, dict[str, Any] | None], limits: SandboxLimits, killed: int) -> None:
    number, source, tests = job
    exam = None if tests is None else Exam(**tests)
    try:
        pid = os.fork()
    except OSError as error:
        _write_report(number, failed=_explain(error))
        return
    if pid == 0:
        _supervise(number, source, exam, limits, killed)
    if os.waitpid(pid, 0)[1] != 0:
        _write_report(number, code=0, is_lost=True)  # it was killed before it could report


def _supervise(number: int, source: str, exam: Exam | None, limits: SandboxLimits, killed: int) -> NoReturn:
    status = 1
    try:
        for prepare in (kernel.die_with_parent, kernel.adopt_orphans):
            with suppress(OSError):
                prepare()
        watch = Watch(limits)
        try:
            pid, pipe = _start(source, exam, limits)
        except OSError as error:
            _write_report(number, failed=_explain(error))
        else:
            code = None
            try:
                reply, code = _follow(pid, pipe, watch)
            finally:
                _end(pid, is_over=code is not None)
            _write_report(
                number,
                reply=reply.decode("utf-8", "replace"),
                code=code,
                verdict=watch.verdict,
                seconds=watch.seconds,
                is_lost=code == -signal.SIGKILL,
                is_machine=code == -signal.SIGKILL and count_killed_for_memory() > killed,
            )
        status = 0
    finally:
        os._exit(status)


def _explain(error: OSError) -> str:
    return f"no process for it: {error.strerror}"


def _start(source: str, exam: Exam | None, limits: SandboxLimits) -> tuple[int, int]:
    pipe, output = os.pipe()
    jail.isolate_children(limits)
    pid = os.fork()
    if pid == 0:
        try:
            program.run(source, exam, limits, output)
        finally:
            os._exit(1)
    os.close(output)
    return pid, pipe


def _follow(pid: int, pipe: int, watch: Watch) -> tuple[bytes, int | None]:
    """Reads the program's reply until it ends; returns it, and the exit code (negative: the signal that ended it).

    The code is None if the program has to be ended.
    """
    reply, code, is_open, pause = b"", None, True, 0.0
    while True:
        ready = select.select([pipe, 0] if is_open else [0], [], [], pause)[0]
        if 0 in ready:  # between jobs nothing comes but the end
            raise EOFError
        if pipe in ready:
            part = os.read(pipe, 65536)
            reply += part
            if not part or len(reply) > MAX_REPLY:
                os.close(pipe)  # so that a program that writes on does not wait for a reader
                is_open, pause = False, 0.0001
            continue
        if code is not None:
            return reply, code
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:  # what it wrote last may still be in the pipe, which others may hold open
            watch.end(usage.ru_utime + usage.ru_stime)
            code, pause = os.waitstatus_to_exitcode(status), 0.0
        elif watch.is_over():
            return reply, None
        else:
            pause = watch.pause() if is_open else min(2 * pause, 0.01)


def _end(pid: int, is_over: bool) -> None:
    """Ends the program, its group, and whatever has become ours since; returns after the last is gone."""
    with suppress(OSError):
        os.killpg(pid, signal.SIGKILL)
    if not is_over:
        os.kill(pid, signal.SIGKILL)
    while True:
        for child in find_children(os.getpid()):
            with suppress(OSError):
                os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _write_report(number: int, **report: Any) -> None:
    """Writes the report of a job, or of what has become of it.

    `reply`: what the program wrote. `code`: its exit code, as of a subprocess; None if it had to be ended, and then
    `verdict` says why (of `Watch`), also if it ended by itself with its time spent. `seconds`: its CPU time. `failed`:
    why it could not be started. `is_lost`: something has killed it, or its supervisor. `is_machine`: the kernel has
    ended processes for want of memory.
    """
    os.write(1, json.dumps({"number": number} | report).encode() + b"\n")
