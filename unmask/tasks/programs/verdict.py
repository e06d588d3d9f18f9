"""The outcome of a program, read from its supervisor's report. A program's own reply is not trusted."""

import json
import math
import resource
import signal
from dataclasses import dataclass, replace
from typing import Any

from unmask.tasks.programs.answers import read_number
from unmask.tasks.programs.inside.jail import SandboxLimits
from unmask.tasks.programs.inside.program import MAX_OUTPUT, NOT_STARTED

REASONS = ("ran", "wrong", "syntax", "blocked", "error", "timeout", "memory", "no_program", "not_graded")


@dataclass(frozen=True)
class Outcome:
    """The outcome of one program.

    Attributes:
        reason: one of `REASONS`, or `correct` where tests have judged it (`solutions`); `ran` means that it gave a
            finite number (1: it passes its tests), `wrong` that a test's assertion fails, `not_graded` that the machine
            could not run it.
        value: that number, else None. (An int only where a float cannot hold it.)
        output: the beginning of what it printed if it ran; else a short explanation for people.
        program: what was run: the program without the trailing lines that kept it from compiling.
    """

    reason: str
    value: float | int | None
    output: str
    program: str
    is_doubtful: bool = False
    """True if the machine may be to blame, not the program, which therefore deserves another try."""

    @property
    def is_graded(self) -> bool:
        """False if the machine could not run the program."""
        return self.reason != "not_graded"

    @classmethod
    def not_graded(cls, why: str, program: str) -> "Outcome":
        """Makes the outcome of a program that the machine could not run."""
        return cls("not_graded", None, why, program, is_doubtful=True)


def read_report(program: str, report: dict[str, Any], limits: SandboxLimits) -> Outcome:
    """Reads a supervisor's report (`inside.server`): what the program wrote, and how it ended."""
    messages = [_read_message(line) for line in str(report.get("reply", "")).split("\n") if line]
    lines = messages[0].get("lines") if messages else None
    is_parsed = type(lines) is int and 0 < lines <= program.count("\n") + 1
    kept = "\n".join(program.split("\n")[:lines]) if is_parsed else program
    code, verdict = report.get("code"), report.get("verdict")
    if "failed" in report or verdict == "clock":
        clock = f"had {report.get('seconds', 0):.2g} s of CPU time in {limits.wall_seconds:g} s on the clock"
        return Outcome.not_graded(str(report.get("failed", clock)), kept)
    if verdict is not None:
        most = f"{limits.seconds:g} s of CPU time" if verdict == "cpu" else f"{limits.wall_seconds:g} s on the clock"
        return Outcome("timeout", None, f"no result within {most}", kept)
    if code == NOT_STARTED and not is_parsed:
        return Outcome.not_graded("no memory or descriptors to lock it up", kept)
    if report.get("is_machine"):
        return Outcome.not_graded("ended by the system, which ran out of memory", kept)
    if report.get("is_lost"):
        return replace(_explain_end(int(code or 0), is_parsed, kept), is_doubtful=True)
    if messages and "reason" in messages[-1]:
        return _check_memory(_read_result(messages[-1], kept), limits)
    return _explain_end(int(code or 0), is_parsed, kept)


def _check_memory(outcome: Outcome, limits: SandboxLimits) -> Outcome:
    """Blames the machine for want of memory where a limit of the user's gives programs less than they are promised."""
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    if outcome.reason != "memory" or most == resource.RLIM_INFINITY or most >= limits.memory:
        return outcome
    return Outcome.not_graded(f"needs more than {most >> 20} MiB, which a limit of this user allows", outcome.program)


def _read_message(line: str) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _read_result(message: dict[str, Any], program: str) -> Outcome:
    reason, value, output = (message.get(key) for key in ("reason", "value", "output"))
    if reason not in REASONS or not isinstance(output, str):
        return Outcome("error", None, "an unreadable result", program)
    if reason != "ran":
        return Outcome(str(reason), None, output[:MAX_OUTPUT], program)
    if isinstance(value, float) and not math.isfinite(value):
        return Outcome("error", None, f"the result is {value}", program)
    try:
        return Outcome("ran", read_number(value), output[:MAX_OUTPUT], program)
    except ValueError as error:
        return Outcome("error", None, f"the result {error}", program)


def _explain_end(code: int, is_parsed: bool, program: str) -> Outcome:
    """Makes the outcome of a program that left no result."""
    how = f"ended with code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
    if not is_parsed and code < 0:  # the parser itself came down
        return Outcome("syntax", None, f"cannot be parsed: {how}", program)
    if -code == signal.SIGKILL:  # not for its time: so the system did it, for want of memory
        return Outcome("memory", None, "ended by the system, most likely for its use of memory", program)
    if -code == signal.SIGXCPU:
        return Outcome("timeout", None, "used up its CPU time", program)
    return Outcome("error", None, f"no result: {how}", program)
