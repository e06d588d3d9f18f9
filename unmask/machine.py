"""Limits of the machine: how many CPUs and how much memory this process may use."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from unmask.errors import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_MEMINFO = Path("/proc/meminfo")
_GIB = 2**30


def cpus() -> int:
    """Returns how many CPUs this process may use, at least 1: those of its affinity, within its cgroups' quotas."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(math.ceil, _cpu_quotas())]))


def use_threads(count: int | None = None) -> None:
    """Sets the threads of PyTorch (default: `OMP_NUM_THREADS`, or its own choice, but no more than `cpus()`).

    PyTorch knows the affinity, but not the quota of a container, within which more threads only wait for each other.
    """
    import torch  # here, for verbs that need no torch

    if count is None and not os.environ.get("OMP_NUM_THREADS") and torch.get_num_threads() > cpus():
        count = cpus()
    if count is not None:
        torch.set_num_threads(count)


def memory() -> int:
    """Returns how many bytes this process may use: the machine's RAM and swap, or its cgroups' limit if that is lower.

    A limit of the process itself (`ulimit -v`) counts as well.
    """
    ram, swap = _ram_and_swap()
    limits = [ram + swap]
    for folder in _own_folders("memory"):
        for file, swap_file in (("memory.max", "memory.swap.max"), ("memory.limit_in_bytes", "")):
            limit = _number(folder / file)
            if limit is not None:
                own_swap = _number(folder / swap_file) if swap_file else None
                limits.append(limit + (swap if own_swap is None else min(swap, own_swap)))
    if resource is not None:
        own = resource.getrlimit(resource.RLIMIT_AS)[0]
        limits += [own] if own != resource.RLIM_INFINITY else []
    return int(min(limits))


def require_memory(needed: int | float, what: str, fix: str, *, limit: int | None = None) -> None:
    """Raises an error if `needed` bytes are more than there are; `needed` should be a lower bound.

    Args:
        needed: of any size: whole numbers do not overflow.
        what: what needs them, as the start of the message.
        fix: what to do about it.
        limit: bytes of a GPU (default: this machine's, `memory()`).

    Raises:
        UserError: "`what` needs 47 GiB, this machine has 24; `fix`".
    """
    place = "this machine" if limit is None else "the GPU"
    if needed > (limit := memory() if limit is None else limit):
        raise UserError(f"{what} needs {_gib(needed)} GiB, {place} has {_gib(limit)}; {fix}")


def _gib(size: int | float) -> str:
    number = min(size, 1e300) / _GIB  # a whole number may be too large for a float
    return f"{number:,.0f}" if 10 <= number < 1e6 else f"{number:.2g}"


def _ram_and_swap() -> tuple[float, float]:
    ram = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        lines = (line.split() for line in _MEMINFO.read_text().splitlines())
        return ram, next(1024.0 * float(line[1]) for line in lines if line[0] == "SwapTotal:")
    except (OSError, ValueError, IndexError, StopIteration):  # no such file: another system
        return ram, 0.0


def _cpu_quotas() -> Iterator[float]:
    """Yields the CPUs of each quota that holds for this process: of its cgroup and of those around it."""
    for folder in _own_folders("cpu"):
        try:
            limit, period = (folder / "cpu.max").read_text().split()
            if limit != "max":
                yield float(limit) / float(period)
        except (OSError, ValueError):
            quota, length = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
            if quota and length and quota > 0:
                yield quota / length


def _own_folders(controller: str) -> Iterator[Path]:
    """Yields the folders of the cgroups, versions 1 and 2, that this process is in, and of their parents.

    In a container the cgroup is often mounted as the root, whatever path the kernel says.
    """
    roots = [(_CGROUPS, "/"), (_CGROUPS / controller, "/")]
    try:
        for line in _OWN_CGROUPS.read_text().splitlines():
            _, names, path = line.split(":", 2)
            if not names:
                roots.append((_CGROUPS, path))
            elif controller in names.split(","):
                roots += [(_CGROUPS / controller, path), (_CGROUPS / names, path)]
    except (OSError, ValueError):
        pass
    seen = set()
    for root, path in roots:
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            folder = root.joinpath(*parts[:depth])
            if folder not in seen:
                seen.add(folder)
                yield folder


def _number(file: Path) -> float | None:
    try:
        return float(file.read_text())
    except (OSError, ValueError):  # "max", or no such file
        return None
