"""Runs programs that a model wrote, away from everything.

A program runs in a process of its own (`inside/`), forked from a lean server, never in ours:

* **Before it runs** its syntax tree is checked, and it gets harmless builtins and a few modules cut down to harmless
  names.
* **While it runs** an audit hook ends it at the first file, socket, process or import. Where Linux lets us, it has no
  system call but those that compute (seccomp), process ids and network of its own, an empty folder for a file system,
  and is nobody. CPU time, memory, file growth, processes and descriptors are limited; the environment is empty.
* **Its end** is decided outside: a supervisor kills it, and all it started, when `seconds` have passed on the clock.
* **Its result** comes back as one bounded line of JSON: an int, float or string of exactly that type. No pickle.

What is guaranteed: with seccomp (Linux on x86-64 and ARM64) a program that breaks out of the Python layers can still do
no more than compute, within its limits, and write to its own pipe. It may write any result there, which gains it
nothing: it may as well return that result, and the right answer is never in its reach. Without seccomp the other layers
stand. Faults of the kernel are beyond all this. On macOS there are only the check, the audit hook, the limits and the
kill: do not grade there what you would not run.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from multiprocessing.connection import wait

from unmask.tasks.programs.inside.jail import SandboxLimits
from unmask.tasks.programs.verdict import Outcome, read_report
from unmask.tasks.programs.worker import Worker

SECONDS = 1.0
MEMORY = 512 << 20
MAX_LENGTH = 50_000
"""Most characters of a program; a longer one counts as a syntax error."""

_WORKERS_PER_CPU = 2  # endless loops are most of the time, and end by the clock; honest programs need milliseconds


def run_programs(
    programs: Sequence[str],
    *,
    seconds: float = SECONDS,
    memory: int = MEMORY,
    workers: int | None = None,
    update: Callable[[int], None] | None = None,
    without: tuple[str, ...] = (),
) -> list[Outcome]:
    """Runs each program, and calls its last top-level function that can be called without arguments.

    What that returns must be a finite int or float, or a string that is one ("$1,234"); a bool is not.

    Args:
        seconds: wall-clock time for each program.
        memory: bytes of address space for each, its interpreter (some 40 MB) included.
        workers: programs at once (default: two per CPU).
        update: is called with how many programs are done.
        without: layers to leave out (`inside.jail.LAYERS`): for tests only.

    Raises:
        RuntimeError: no sandbox can be started.
    """
    return _run(programs, SandboxLimits(seconds, memory, without), workers, update)


def compiling_part(program: str) -> str:
    """Returns the program without the trailing lines that keep it from compiling; all of it if nothing compiles."""
    return _run([program], SandboxLimits(SECONDS, MEMORY, call=False), 1, None)[0].program


def _run(
    programs: Sequence[str], limits: SandboxLimits, workers: int | None, update: Callable[[int], None] | None
) -> list[Outcome]:
    outcomes: dict[int, Outcome] = {}
    for number, program in enumerate(programs):
        if len(program) > MAX_LENGTH:
            outcomes[number] = Outcome("syntax", None, f"longer than {MAX_LENGTH} characters", program)
    todo = deque(number for number in range(len(programs)) if number not in outcomes)
    with ExitStack() as stack:
        idle = [
            stack.enter_context(closing(Worker(limits)))
            for _ in range(min(workers or _WORKERS_PER_CPU * _count_cpus(), len(todo)))
        ]
        busy: dict[Worker, int] = {}
        while todo or busy:
            while todo and idle:
                worker = idle.pop()
                busy[worker] = todo.popleft()
                worker.submit(programs[busy[worker]])
            left = min(worker.deadline for worker in busy) - time.monotonic()
            wait([worker.fileno() for worker in busy], max(left, 0.0))
            for worker in list(busy):
                if (report := worker.poll()) is not None:
                    number = busy.pop(worker)
                    outcomes[number] = read_report(programs[number], report, limits.seconds)
                    idle.append(worker)
            if update is not None:
                update(len(outcomes))
    return [outcomes[number] for number in range(len(programs))]


def _count_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
