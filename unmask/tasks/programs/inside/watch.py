"""The time of a program and of all that it has started, watched from outside.

CPU time is limited, whoever spends it: the program, its children, or theirs. On the clock a program has far longer, so
that a busy machine takes nothing from it. Where there is no /proc, only RLIMIT_CPU and the clock end a program.
"""

import os
import time

from .jail import SandboxLimits

_PAUSE, _LEAST_PAUSE = 0.1, 0.005
"""Seconds between two looks; shorter when the program's time is nearly spent. A look costs some 0.1 ms."""
_MOST = 200
"""Processes of one program that are counted; a program that has more is ended, as for its time."""


class Watch:
    """Watches what this process has started.

    Attributes:
        verdict: why the program has to be ended, or None if it may go on. `cpu`: its CPU time is spent. `asleep`: the
            clock has run out, and most of the time nothing of it wanted to run. `clock`: the clock has run out, and
            the machine did not let it run.
        seconds: CPU time that it has had.
    """

    def __init__(self, limits: SandboxLimits) -> None:
        self.verdict: str | None = None
        self.seconds = 0.0
        self._limits = limits
        self._start = self._next = time.monotonic()
        self._looks = self._looks_asleep = 0
        self._next += self.pause()

    def pause(self) -> float:
        """Returns the seconds to wait before the next look."""
        return max(_LEAST_PAUSE, min(_PAUSE, self._limits.seconds - self.seconds))

    def is_over(self) -> bool:
        """True if the program has to be ended. Looks, unless the last look was a moment ago."""
        now = time.monotonic()
        if self.verdict is None and now >= self._next:
            self.seconds, is_awake = _measure()
            self._looks += 1
            self._looks_asleep += not is_awake
            self._next = now + self.pause()
            if self.seconds >= self._limits.seconds:
                self.verdict = "cpu"
            elif now - self._start >= self._limits.wall_seconds:
                self.verdict = "asleep" if 2 * self._looks_asleep > self._looks else "clock"
        return self.verdict is not None

    def end(self, seconds: float) -> None:
        """Notes that the program has ended by itself, and the CPU time of it and of the children that it waited for."""
        self.seconds = max(self.seconds, seconds)
        if self.seconds > self._limits.seconds:
            self.verdict = "cpu"


def find_children(pid: int) -> list[int]:
    """Finds the children of a process; none where /proc does not tell."""
    found = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 (as below)
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:  # noqa: PTH123 (pathlib would be an import more)
                found += [int(child) for child in file.read().split()]
    except OSError:  # it has ended meanwhile
        pass
    return found


def count_killed_for_memory() -> int:
    """Counts the processes that the kernel has ended because the machine, or a group of processes, had no memory."""
    try:
        with open("/proc/vmstat", "rb") as file:  # noqa: PTH123
            return next((int(line.split()[1]) for line in file if line.startswith(b"oom_kill ")), 0)
    except OSError:
        return 0


def _measure() -> tuple[float, bool]:
    """Returns the CPU seconds of all that this process has started, and whether any of it runs or waits to run."""
    todo, states = find_children(os.getpid()), b""
    ticks = number = 0
    while todo:
        pid = todo.pop()
        number += 1
        if number > _MOST:
            return float("inf"), True
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123
                fields = file.read().rpartition(b") ")[2].split()
        except OSError:
            continue
        states += fields[0]
        ticks += sum(int(field) for field in fields[11:15])  # its own, and of children that it has waited for
        todo += find_children(pid)
    is_awake = not states or b"R" in states or b"D" in states  # D: waits for a disk, as while memory is swapped in
    return ticks / os.sysconf("SC_CLK_TCK"), is_awake
