"""Runs programs that a model wrote, away from everything.

A program runs in a process of its own (`inside/`), forked from a lean server, never in ours:

* **Before it runs** its syntax tree is checked, and it gets harmless builtins and a few modules cut down to harmless
  names.
* **While it runs** an audit hook ends it at the first file, socket, process or import. Where Linux lets us, it has no
  system call but those that compute (seccomp), process ids and network of its own, an empty folder for a file system,
  and is nobody. CPU time, memory, file growth, processes and descriptors are limited; the environment is empty.
* **Its end** is decided outside: a supervisor kills it, and all it started, when they had `seconds` of CPU time, or
  ten times as long on the clock.
* **What the machine could not run** (no process, descriptor or memory for it, no CPU time before the clock ran out) is
  no verdict on the program: it is tried again when nothing else of ours runs, and else `not_graded`.
* **Its result** comes back as one bounded line of JSON: an int, float or string of exactly that type. No pickle.

What is guaranteed: with seccomp (Linux on x86-64 and ARM64) a program that breaks out of the Python layers can still do
no more than compute, within its limits, and write to its own pipe. It may write any result there, which gains it
nothing: it may as well return that result, and the right answer is never in its reach. (A solution that breaks out so
far could claim to pass its tests, which run in the same process.) Without seccomp the other layers stand. Faults of the
kernel are beyond all this. On macOS there are only the check, the audit hook, the limits and the kill: do not grade
there what you would not run.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cache
from multiprocessing.connection import wait

from unmask.machine import cpus
from unmask.progress import warn
from unmask.tasks.programs.inside.exam import Exam
from unmask.tasks.programs.inside.jail import SandboxLimits
from unmask.tasks.programs.verdict import Outcome, read_report
from unmask.tasks.programs.worker import SandboxFailed, Worker

SECONDS = 1.0
MAX_LENGTH = 50_000
"""Most characters of a program; a longer one counts as a syntax error."""

_MEMORY = 512 << 20
"""Bytes of address space for each program, its interpreter (some 40 MB) included."""
_WORKERS_PER_CPU = 2  # a program takes milliseconds, and two forks: while one starts, another runs
_PATIENCE_ALONE = 30.0
"""Times `seconds` on the clock for a program that is tried again."""
_PAUSE_BEFORE_RETRY = 1.0
"""Seconds in which the processes, descriptors and memory that were wanting may come free."""


def run_programs(
    programs: Sequence[str],
    *,
    exams: Sequence[Exam] | None = None,
    seconds: float = SECONDS,
    workers: int | None = None,
    update: Callable[[int], None] | None = None,
    without: tuple[str, ...] = (),
) -> list[Outcome]:
    """Runs each program, and calls its last top-level function that can be called without arguments.

    What that returns must be a finite int or float, or a string that is one ("$1,234"); a bool is not.

    Args:
        exams: the tests of each program, which is then a solution: nothing of it is called but by them, and its value
            is 1 if it passes. A solution that breaks out of the layers of Python could report that it does.
        seconds: CPU time for each program and what it starts; it may take ten times as long on the clock.
        workers: programs at once (default: two per CPU); fewer where the system lets us have no more processes.
        update: is called with how many programs are done.
        without: layers to leave out (`inside/jail.py` lists them): for tests only.

    Raises:
        SandboxFailed: no sandbox can be started.
    """
    limits = SandboxLimits(seconds, _MEMORY, without)
    outcomes: dict[int, Outcome] = {}
    for number, program in enumerate(programs):
        if len(program) > MAX_LENGTH:
            outcomes[number] = Outcome("syntax", None, f"longer than {MAX_LENGTH} characters", program)
    todo = deque(number for number in range(len(programs)) if number not in outcomes)
    crew = _Crew(programs, exams, limits, outcomes, update)
    crew.run(todo, workers or _WORKERS_PER_CPU * cpus())
    if doubtful := [number for number, outcome in outcomes.items() if outcome.is_doubtful]:
        time.sleep(_PAUSE_BEFORE_RETRY)
        crew.limits = replace(limits, patience=_PATIENCE_ALONE)
        crew.run(deque(doubtful), 1)
    if todo and not crew.has_started:
        raise SandboxFailed(crew.failure)
    return [outcomes[number] for number in range(len(programs))]


class _Crew:
    """Workers that run programs at once, as many as asked for or as the system lets us have."""

    def __init__(
        self,
        programs: Sequence[str],
        exams: Sequence[Exam] | None,
        limits: SandboxLimits,
        outcomes: dict[int, Outcome],
        update: Callable[[int], None] | None,
    ) -> None:
        self.programs, self.exams, self.limits, self.outcomes, self.update = programs, exams, limits, outcomes, update
        self.failure = ""
        self.has_started = False

    def run(self, numbers: Iterable[int], most: int) -> None:
        """Runs the programs of these numbers, and sets their outcomes."""
        todo, idle, busy = deque(numbers), list[Worker](), dict[Worker, int]()
        asked = most = min(most, len(todo))
        with ExitStack() as stack:
            while todo or busy:
                while todo and (idle or len(busy) < most):
                    if not idle:
                        try:
                            idle.append(stack.enter_context(closing(Worker(self.limits))))
                        except SandboxFailed as error:
                            self.failure, most = str(error), len(busy)
                            break
                        self.has_started = True
                    worker = idle.pop()
                    busy[worker] = todo.popleft()
                    number = busy[worker]
                    worker.submit(self.programs[number], None if self.exams is None else self.exams[number])
                if not busy:  # and nothing can be started
                    self.outcomes |= {each: Outcome.not_graded(self.failure, self.programs[each]) for each in todo}
                    todo.clear()
                for worker in self._wait(busy):
                    if (report := worker.poll()) is None:
                        continue
                    number = busy.pop(worker)
                    if "failed" in report and (busy or idle):  # there may be processes enough for fewer at once
                        self.failure, most = str(report["failed"]), len(busy) + len(idle)
                        worker.close()
                        todo.appendleft(number)
                        continue
                    self.outcomes[number] = read_report(self.programs[number], report, self.limits)
                    if not worker.is_over:
                        idle.append(worker)
                if self.update is not None:
                    self.update(len(self.outcomes))
        if 0 < most < asked:
            _warn_once(f"{most} instead of {asked} programs run at once: {self.failure}")

    def _wait(self, busy: dict[Worker, int]) -> list[Worker]:
        if busy:
            left = min(worker.deadline for worker in busy) - time.monotonic()
            wait([worker.fileno() for worker in busy], max(left, 0.0))
        return list(busy)


@cache
def _warn_once(message: str) -> None:
    warn(message)
