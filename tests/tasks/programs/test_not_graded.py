"""What the machine could not run is no verdict on a program; the limit of a program is its CPU time.

Servers of these tests get a patch: code that runs in them before they serve, with `os`, `program` and `jail` at hand.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import run_cli
from unmask.tasks.programs import sandbox, worker
from unmask.tasks.programs.grading import judge
from unmask.tasks.programs.inside import watch
from unmask.tasks.programs.inside.jail import SandboxLimits
from unmask.tasks.programs.inside.program import NOT_STARTED
from unmask.tasks.programs.sandbox import run_programs
from unmask.tasks.programs.verdict import read_report

LIMITS = SandboxLimits(1.0, 1 << 29)
HONEST = [f"def f():\n    return {number}" for number in range(6)]
NO_FORK = "def fail():\n    raise BlockingIOError(11, 'Resource temporarily unavailable')\n"
Patch = Callable[[str], None]


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> Patch:
    start, call = worker._START.rsplit("; ", 1)
    monkeypatch.setattr(sandbox, "_PAUSE_BEFORE_RETRY", 0.0, raising=False)

    def set_patch(code: str) -> None:
        lines = start.replace("; ", "\n") + "\nimport os, time\nfrom inside import jail, program\n"
        monkeypatch.setattr(worker, "_START", lines + code + call)

    return set_patch


def test_a_grading_without_processes_fails(patch: Patch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    patch(NO_FORK + "os.fork = fail\n")
    rows = [{"program": program, "answer": 1} for program in [*HONEST, "It is 1."]]
    path, out = tmp_path / "x.jsonl", tmp_path / "out.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert run_cli("grade", path, "--json", "--out", out) == 1
    captured = capfd.readouterr()
    grade = json.loads(captured.out)
    assert [grade[key] for key in ("n", "correct", "accuracy", "not_graded")] == [1, 0, 0.0, 6]
    assert grade["reasons"] == {"no_program": 1}
    assert "Error: 6 of 7 programs could not be run, and are not graded" in captured.err
    assert "Resource temporarily unavailable" in captured.err
    assert "Traceback" not in captured.err
    assert [json.loads(line)["correct"] for line in out.read_text().splitlines()] == [None] * 6 + [False]
    assert run_cli("grade", path) == 1
    assert "6 of 7 not graded" in capfd.readouterr().out


def test_nothing_graded_has_no_accuracy(patch: Patch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    patch("raise SystemExit\n")
    (tmp_path / "x.jsonl").write_text(json.dumps({"program": HONEST[1], "answer": 1}))
    assert run_cli("grade", tmp_path / "x.jsonl", "--json") == 1
    grade = json.loads(capfd.readouterr().out)
    assert (grade["accuracy"], grade["interval"], grade["not_graded"]) == (None, None, 1)


def test_fewer_processes_run_fewer_programs_at_once(
    patch: Patch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One server alone can fork."""
    free = tmp_path / "free"
    free.touch()
    take = f"try:\n    os.rename({str(free)!r}, {str(free) + '.taken'!r})\nexcept OSError:\n    os.fork = fail\n"
    patch(NO_FORK + take)
    sandbox._warn_once.cache_clear()
    outcomes = run_programs(HONEST, workers=3)
    assert [outcome.value for outcome in outcomes] == list(range(6))
    assert capsys.readouterr().err.count("1 instead of 3 programs run at once") == 1


def test_what_failed_once_is_tried_again(patch: Patch, tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.touch()
    once = (
        f"fork = os.fork\ndef fork_later():\n    if os.path.exists({str(first)!r}):\n"
        f"        os.remove({str(first)!r})\n        fail()\n    return fork()\nos.fork = fork_later\n"
    )
    patch(NO_FORK + once)
    assert [outcome.value for outcome in run_programs(HONEST, workers=1)] == list(range(6))


def test_a_program_that_cannot_be_locked_up_does_not_run(patch: Patch) -> None:
    patch("def enter(*_):\n    raise OSError(24, 'Too many open files')\njail.enter = enter\n")
    (judgement,) = judge([HONEST[1]], [1])
    assert (judgement.reason, judgement.is_graded, judgement.is_correct) == ("not_graded", False, False)


SLEEPY = "run = program.run\ndef late(*arguments):\n    time.sleep({})\n    run(*arguments)\nprogram.run = late\n"


def test_time_on_the_clock_does_not_count(patch: Patch) -> None:
    """As on a machine that is busy with something else."""
    patch(SLEEPY.format(1))
    assert [outcome.value for outcome in run_programs(HONEST[:2], seconds=0.4)] == [0, 1]


def test_a_program_that_sleeps_is_ended(patch: Patch) -> None:
    patch(SLEEPY.format(600))
    (outcome,) = run_programs(HONEST[:1], seconds=0.1)
    assert (outcome.reason, outcome.output) == ("timeout", "no result within 5 s on the clock")


def test_cpu_time_of_children_counts() -> None:
    without = ("check", "audit", "namespaces", "chroot", "user", "seccomp", "limits")
    busy = "import os\ndef f():\n    if os.fork() == 0:\n        while True:\n            pass\n    os.wait()"
    (outcome,) = run_programs([busy], seconds=0.3, without=without)
    assert (outcome.reason, outcome.output) == ("timeout", "no result within 0.3 s of CPU time")


@pytest.mark.parametrize(
    ("seconds", "is_awake", "passed", "verdict"),
    [
        (1.0, True, 2.0, "cpu"),
        (0.2, True, 11.0, "clock"),
        (0.2, False, 11.0, "asleep"),
        (0.9, True, 9.0, None),
        (0.2, False, 9.0, None),
    ],
)
def test_verdicts_on_time(
    seconds: float, is_awake: bool, passed: float, verdict: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watch, "_measure", lambda: (seconds, is_awake))
    own = watch.Watch(LIMITS)
    assert not own.is_over()
    now[0] += passed
    assert own.is_over() is (verdict is not None)
    assert own.verdict == verdict


REPORTS = {
    "no memory on the machine": ({"code": -9, "is_lost": True, "is_machine": True}, "not_graded", True),
    "killed": ({"code": -9, "is_lost": True, "reply": '{"lines": 2}\n'}, "memory", True),
    "its server died": ({"code": 1, "is_lost": True}, "error", True),
    "no process": ({"failed": "no process for it"}, "not_graded", True),
    "no chance": ({"verdict": "clock", "seconds": 0.1}, "not_graded", True),
    "not locked up": ({"code": NOT_STARTED}, "not_graded", True),
    "it says so itself": ({"code": NOT_STARTED, "reply": '{"lines": 2}\n'}, "error", False),
    "too late": ({"code": 0, "verdict": "cpu", "reply": '{"lines": 2}\n'}, "timeout", False),
    "empty": ({}, "error", False),
}


@pytest.mark.parametrize(("report", "reason", "is_doubtful"), REPORTS.values(), ids=REPORTS)
def test_only_what_the_machine_may_have_done_is_tried_again(
    report: dict[str, object], reason: str, is_doubtful: bool
) -> None:
    outcome = read_report(HONEST[0], report, LIMITS)
    assert (outcome.reason, outcome.is_doubtful, outcome.value) == (reason, is_doubtful, None)
