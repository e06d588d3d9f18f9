"""What the operating system keeps from a program. Each layer stands alone: where one is refused, the others remain.

Layers, by the names that `Settings.without` takes (for tests, which try each on its own):

* `namespaces`: process ids, network and IPC of its own (as root, or through a user namespace).
* `chroot`: an empty folder, deleted already so that nothing can be made in it, is all of the file system.
* `user`: root becomes nobody; capabilities are given up.
* `seccomp`: only system calls that compute.
* `limits`: CPU time, address space, and no file growth, no new process, no core dump. (`memory` always holds.)
"""

import os
import resource
import signal
from contextlib import suppress

from . import kernel
from .settings import Settings

_NOBODY = 65534


def isolate(settings: Settings) -> None:
    """What all programs of one server share: no network, no IPC, and the right to namespaces of process ids."""
    if not settings.has("namespaces"):
        return
    user, group = os.geteuid(), os.getegid()
    shared = kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC
    with suppress(OSError):
        if user == 0:
            kernel.unshare(shared)
        else:
            kernel.unshare(kernel.CLONE_NEWUSER | shared)
            _map_ids(user, group)


def isolate_children(settings: Settings) -> None:
    """The next child is process 1 of its own namespace: when it ends, so does all that it started."""
    if settings.has("namespaces"):
        with suppress(OSError):
            kernel.unshare(kernel.CLONE_NEWPID)


def enter(settings: Settings, output: int) -> int:
    """Locks this process up; returns the descriptor that is `output` from now on, the only one of use."""
    os.setsid()
    output = _close_all_but(output)
    if settings.has("chroot"):
        with suppress(OSError):
            os.chroot(".")
            os.chdir("/")
    if settings.has("user"):
        _become_nobody()
    _limit(settings)
    with suppress(OSError):
        kernel.die_with_parent()  # after the change of user, which undoes it
    if settings.has("seccomp"):
        with suppress(OSError):
            kernel.allow_only_computing()
    return output


def _map_ids(user: int, group: int) -> None:
    """In the new user namespace this process stays who it was, but may make namespaces."""
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


def _limit(settings: Settings) -> None:
    seconds = int(settings.seconds) + 2  # the wall clock comes first; this is for what would escape it
    limits = {resource.RLIMIT_AS: settings.memory}
    if settings.has("limits"):
        limits |= {
            resource.RLIMIT_CPU: seconds,
            resource.RLIMIT_FSIZE: 0,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_NPROC: 0,
            resource.RLIMIT_NOFILE: 16,
        }
    for limit, value in limits.items():
        with suppress(OSError, ValueError):
            resource.setrlimit(limit, (value, value))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
