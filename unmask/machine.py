"""Limits of the machine: how many CPUs and how much memory this process may use."""

import math
import os
from pathlib import Path

from unmask.errors import UserError

_CGROUP = Path("/sys/fs/cgroup")
_GIB = 2**30


def cpus() -> int:
    """Returns how many CPUs this process may use, at least 1: those of its affinity, within its cgroup's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return max(1, allowed if quota is None else min(allowed, math.ceil(quota)))


def memory() -> int:
    """Returns how many bytes this process may use: the machine's RAM, or its cgroup's limit if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (_number("memory.max"), _number("memory/memory.limit_in_bytes"))
    return int(min(total, *(limit for limit in limits if limit is not None), math.inf))


def require_memory(needed: int | float, what: str, fix: str) -> None:
    """Raises an error if `needed` bytes are more than this machine has; `needed` should be a lower bound.

    Raises:
        UserError: "`what` needs 47 GiB, this machine has 24; `fix`".
    """
    if needed > (limit := memory()):
        raise UserError(f"{what} needs {_gib(needed)} GiB, this machine has {_gib(limit)}; {fix}")


def _gib(size: int | float) -> str:
    number = size / _GIB
    return f"{number:,.0f}" if 10 <= number < 1e6 else f"{number:.2g}"


def _cpu_quota() -> float | None:
    """Returns the CPUs of the cgroup's quota (version 2, then 1), or None if there is none."""
    try:
        limit, period = (_CGROUP / "cpu.max").read_text().split()
        return float(limit) / float(period) if limit != "max" else None
    except (OSError, ValueError):
        quota, length = _number("cpu/cpu.cfs_quota_us"), _number("cpu/cpu.cfs_period_us")
        return quota / length if quota and length and quota > 0 else None


def _number(name: str) -> float | None:
    try:
        return float((_CGROUP / name).read_text())
    except (OSError, ValueError):  # "max", or no such file
        return None
