"""Whatever a program does, it gets a verdict with the reason, and we go on: nothing written, none killed, none left.

The layers are also tried on their own: a hole in one must not be hidden by another.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tasks.programs.hostile import CHECKED, UNCHECKED, UNRULY
from unmask.tasks.programs import worker
from unmask.tasks.programs.sandbox import run_programs
from unmask.tasks.programs.verdict import REASONS, Outcome

SECONDS = round(0.7 + os.getpid() * 1e-9 + 1e-10, 10)
"""Also what our servers can be told by: it stands in their command lines. The last digit keeps it from being the
beginning of another process's."""

HONEST = "def f():\n    return {} / 4"

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's layers are Linux's")

LAYERS = {
    "audit hook": ("check",),
    "kernel": ("check", "audit"),
    "kernel without seccomp": ("check", "audit", "seccomp"),
    "seccomp alone": ("check", "audit", "namespaces", "chroot", "user", "limits"),
}


def servers() -> list[int]:
    """Processes of this test's servers, zombies too (their command line is gone, but not their parent)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            is_ours = str(SECONDS) in (folder / "cmdline").read_text()
        except OSError:
            continue
        if is_ours or (state == "Z" and int(parent) == os.getpid()):
            found.append(int(folder.name))
    return found


def require(without: tuple[str, ...]) -> None:
    """Skips where the system refuses what would take the place of the layers that are left out."""
    if "audit" not in without:
        return
    probe = "import os\ndef f():\n    return os.get{}()"
    pid, parent = run_programs([probe.format("pid"), probe.format("ppid")], seconds=SECONDS, without=without)
    if "seccomp" not in without and parent.value != -1:
        pytest.skip("no seccomp here")
    if "seccomp" in without and pid.value != 1:
        pytest.skip("no namespaces here")


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    deadline = time.monotonic() + 30
    while servers() and time.monotonic() < deadline:  # on a busy machine the killed take a moment to go
        time.sleep(0.05)
    assert not servers()
    assert not list(tmp_path.glob("unmask-*"))


@pytest.fixture
def canary() -> Iterator[Path]:
    """Where nobody may write, too, if only the sandbox lets it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        path = Path(folder) / "canary"
        path.write_text("alive")
        path.chmod(0o666)
        Path(folder).chmod(0o777)
        yield path
        assert path.read_text() == "alive"
        assert list(path.parent.iterdir()) == [path]
        assert path.stat().st_mode & 0o777 == 0o666


def run(programs: list[str], without: tuple[str, ...] = ()) -> list[Outcome]:
    """The outcomes, after holding that honest programs among them were not disturbed."""
    mixed = [part for n, program in enumerate(programs) for part in (program, HONEST.format(n))]
    outcomes = run_programs(mixed, seconds=SECONDS, without=without)
    assert [outcome.value for outcome in outcomes[1::2]] == [n / 4 for n in range(len(programs))]
    assert all(outcome.reason in REASONS and len(outcome.output) <= 500 for outcome in outcomes)
    return outcomes[::2]


@pytest.fixture(scope="module")
def checked() -> dict[str, Outcome]:
    return dict(zip(CHECKED, run([program for program, _ in CHECKED.values()]), strict=True))


@pytest.mark.parametrize("name", CHECKED)
def test_every_attempt_gets_its_reason(name: str, checked: dict[str, Outcome]) -> None:
    assert checked[name].reason in CHECKED[name][1], checked[name]
    assert checked[name].value is None
    assert checked[name].output


@needs_linux
@pytest.mark.parametrize("without", LAYERS.values(), ids=LAYERS.keys())
def test_layers_on_their_own_prevent_harm(without: tuple[str, ...], canary: Path) -> None:
    require(without)
    outcomes = run([program.replace("CANARY", str(canary)) for program in UNCHECKED.values()], without)
    harmed = {name: outcome for name, outcome in zip(UNCHECKED, outcomes, strict=True) if outcome.reason == "ran"}
    assert not harmed


@needs_linux
@pytest.mark.parametrize("without", LAYERS.values(), ids=LAYERS.keys())
def test_layers_on_their_own_hold_the_unruly(without: tuple[str, ...]) -> None:
    require(without)
    outcomes = dict(zip(UNRULY, run(list(UNRULY.values()), without), strict=True))
    for name in ("lying number", "lying name", "lying error", "no result", "nested result", "exit"):
        assert outcomes[name].reason in ("error", "blocked"), name
    for name in ("ignored signals", "closed descriptors"):
        assert outcomes[name].reason in ("timeout", "blocked"), name


@needs_linux
def test_killing_all_kills_only_its_own() -> None:
    without = LAYERS["kernel without seccomp"]
    require(without)  # or it would be our processes
    run(["import os\ndef f():\n    os.kill(-1, 9)\n    return 1"], without)


@needs_linux
def test_a_program_that_ends_its_supervisor_or_the_server_gets_a_verdict() -> None:
    """No layer but limits: as where the system refuses everything else."""
    without = ("check", "audit", "namespaces", "chroot", "user", "seccomp")
    names = ("kill the parent", "kill the session", "kill itself", "exit")
    outcomes = dict(zip(names, run([UNRULY[name] for name in names], without), strict=True))
    assert outcomes["kill the parent"].reason == outcomes["kill the session"].reason == "error"
    assert outcomes["kill itself"].reason == "memory"  # nobody else sends SIGKILL before the deadline
    assert outcomes["exit"].output == "no result: ended with code 0"


@needs_linux
def test_a_program_that_stops_the_clock_gets_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its supervisor sleeps, so the server waits: we end both."""
    monkeypatch.setattr(worker, "_GRACE", 0.5)
    without = ("check", "audit", "namespaces", "chroot", "user", "seccomp")
    (outcome,) = run([UNRULY["stop the parent"]], without)
    assert outcome.reason == "timeout"
    wait_until(lambda: not servers(), seconds=2)  # init has to bury them


@needs_linux
def test_what_a_program_leaves_running_is_ended(tmp_path: Path) -> None:
    """A daemon, as root without any layer that forbids it: supervisors adopt orphans."""
    without = ("check", "audit", "namespaces", "chroot", "user", "seccomp", "limits")
    daemon = (
        "import os, time\ndef f():\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n"
        f"            open({str(tmp_path / 'started')!r}, 'w')\n            time.sleep(60)\n        os._exit(0)\n"
        "    time.sleep(0.2)\n    return 3"
    )
    (outcome,) = run([daemon], without)
    assert outcome.value == 3.0
    assert (tmp_path / "started").exists()


@needs_linux
def test_an_interrupt_leaves_nothing_behind() -> None:
    """`nothing_is_left` looks."""
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_programs(["def f():\n    while True:\n        pass"] * 50, seconds=round(SECONDS + 60, 10))
    assert time.monotonic() - start < 3


@needs_linux
def test_what_the_killed_leave_ends_by_itself() -> None:
    code = (
        "from unmask.tasks.programs.sandbox import run_programs\n"
        f"run_programs(['def f():\\n    while True: pass'] * 9, seconds={SECONDS!r} + 60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: len(servers_of(SECONDS + 60)) >= 3)
    parent.kill()
    parent.wait()
    wait_until(lambda: not servers_of(SECONDS + 60))


def servers_of(seconds: float) -> list[Path]:
    def command(folder: Path) -> str:
        try:
            return (folder / "cmdline").read_text()
        except OSError:
            return ""

    return [folder for folder in Path("/proc").glob("[0-9]*") if f'"seconds": {seconds}' in command(folder)]


def wait_until(is_so: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_sandbox_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="the sandbox does not start"):
        run_programs([HONEST.format(1)])
