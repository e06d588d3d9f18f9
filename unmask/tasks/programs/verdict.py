"""The outcome of a program, read from its supervisor's report. A program's own reply is not trusted."""

import json
import math
import signal
from dataclasses import dataclass
from typing import Any

from unmask.tasks.programs.answers import read_number
from unmask.tasks.programs.inside.program import MAX_OUTPUT

REASONS = ("ran", "syntax", "blocked", "error", "timeout", "memory", "no_program")


@dataclass(frozen=True)
class Outcome:
    """The outcome of one program.

    Attributes:
        reason: one of `REASONS`; `ran` means that it gave a finite number.
        value: that number, else None. (An int only where a float cannot hold it.)
        output: the beginning of what it printed if it ran; else a short explanation for people.
        program: what was run: the program without the trailing lines that kept it from compiling.
    """

    reason: str
    value: float | int | None
    output: str
    program: str


def read_report(program: str, report: dict[str, Any], seconds: float) -> Outcome:
    """Reads a supervisor's report: the program's reply, and the code it ended with (None: at the deadline)."""
    messages = [_read_message(line) for line in str(report["reply"]).split("\n") if line]
    lines = messages[0].get("lines") if messages else None
    is_parsed = type(lines) is int and 0 < lines <= program.count("\n") + 1
    kept = "\n".join(program.split("\n")[:lines]) if is_parsed else program
    if report["code"] is None:
        return Outcome("timeout", None, f"no result after {seconds:g} s", kept)
    if messages and "reason" in messages[-1]:
        return _read_result(messages[-1], kept)
    return _explain_end(report["code"], is_parsed, kept)


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
    if -code == signal.SIGKILL:  # the deadline is not here: so the system did it, for want of memory
        return Outcome("memory", None, "ended by the system, most likely for its use of memory", program)
    if -code == signal.SIGXCPU:
        return Outcome("timeout", None, "used up its CPU time", program)
    return Outcome("error", None, f"no result: {how}", program)
