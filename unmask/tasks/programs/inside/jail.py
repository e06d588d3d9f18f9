"""Limits that the operating system sets. Each layer stands alone: where one is refused, the others remain.

Layers, by the names that `SandboxLimits.without` takes (for tests, which try each on its own):

* `namespaces`: process ids, network and IPC of its own (as root, or through a user namespace).
* `chroot`: an empty folder, deleted already so that nothing can be made in it, is all of the file system.
* `user`: root becomes nobody; capabilities are given up.
* `seccomp`: only system calls that compute.
* `limits`: CPU time, address space, and no file growth, no new process, no core dump. (`memory` always holds.)

`check` and `audit` leave out those of Python, which are in `program.py`.
"""

import math
import os
import resource
import signal
from contextlib import suppress
from dataclasses import dataclass

from . import kernel

_NOBODY = 65534


@dataclass(frozen=True)
class SandboxLimits:
    """Limits of every program of a server.

    Attributes:
        seconds: CPU time for each program, and what it starts.
        memory: bytes of address space for each.
        without: layers to leave out, for tests.
        patience: times `seconds` that each may take on the clock.
    """

    seconds: float
    memory: int
    without: tuple[str, ...] = ()
    patience: float = 10.0

    @property
    def wall_seconds(self) -> float:
        """Returns the time on the clock for each program."""
        return self.patience * max(self.seconds, 0.5)

    def has(self, layer: str) -> bool:
        """True if `layer` is in force."""
        return layer not in self.without


def isolate(limits: SandboxLimits) -> None:
    """Takes network and IPC from all programs of one server, and gets the right to namespaces of process ids."""
    if not limits.has("namespaces"):
        return
    user, group = os.geteuid(), os.getegid()
    shared = kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC
    with suppress(OSError):
        if user == 0:
            kernel.unshare(shared)
        else:
            kernel.unshare(kernel.CLONE_NEWUSER | shared)
            _map_ids(user, group)


def isolate_children(limits: SandboxLimits) -> None:
    """Makes the next child process 1 of its own namespace: when it ends, so does all that it started."""
    if limits.has("namespaces"):
        with suppress(OSError):
            kernel.unshare(kernel.CLONE_NEWPID)


def enter(limits: SandboxLimits, output: int) -> int:
    """Locks this process up; returns the descriptor that is `output` from now on, the only one of use."""
    os.setsid()
    output = _close_all_but(output)
    if limits.has("chroot"):
        with suppress(OSError):
            os.chroot(".")
            os.chdir("/")
    if limits.has("user"):
        _become_nobody()
    _limit(limits)
    with suppress(OSError):
        kernel.die_with_parent()  # after the change of user, which undoes it
    if limits.has("seccomp"):
        with suppress(OSError):
            kernel.allow_only_computing()
    return output


def _map_ids(user: int, group: int) -> None:
    """Keeps this process who it was in the new user namespace, where it may make namespaces."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        file = os.open(f"/proc/self/{name}", os.O_WRONLY)
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)


def _close_all_but(output: int) -> int:
    nowhere = os.open(os.devnull, os.O_RDWR)
    output = os.dup2(output, 10, inheritable=False)  # above the standard three, whatever it was
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    os.closerange(3, output)
    os.closerange(output + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    return output


def _become_nobody() -> None:
    with suppress(OSError):
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)
    with suppress(OSError):
        kernel.drop_capabilities()


def _limit(limits: SandboxLimits) -> None:
    most = {resource.RLIMIT_AS: limits.memory}
    if limits.has("limits"):
        _limit_to(resource.RLIMIT_CPU, math.ceil(limits.seconds), math.ceil(limits.seconds) + 1)
        most |= {
            resource.RLIMIT_FSIZE: 0,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_NPROC: 0,
            resource.RLIMIT_NOFILE: 16,
        }
    for limit, value in most.items():
        _limit_to(limit, value, value)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)


def _limit_to(limit: int, soft: int, hard: int) -> None:
    with suppress(OSError, ValueError):
        resource.setrlimit(limit, (soft, hard))
