"""Runs one program in its own locked-up process: parse, check, call, report."""

import ast
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from . import jail
from .check import Blocked, check, compiled, find_entry, namespace, parse
from .exam import BadExam, Exam, take
from .jail import SandboxLimits

Send = Callable[[dict[str, Any]], None]

MAX_OUTPUT = 500
"""Most characters that are kept of what a program printed, or of why it failed."""

NOT_STARTED = 77
"""The exit code of a process that could not be locked up. A program has sent its number of lines before it runs, so it
cannot claim this afterwards."""

_OUT_OF_MEMORY = b'{"reason": "memory", "value": null, "output": "needs more memory than it may have"}\n'
_QUIET_EVENTS = frozenset(("exec", "compile", "object.__getattr__", "object.__setattr__", "object.__delattr__"))


class _Sink:
    """A stand-in for stdout and stderr that keeps the beginning."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text[: MAX_OUTPUT - len(self.text)]
        return len(text)

    def flush(self) -> None: ...


def run(source: str, exam: Exam | None, limits: SandboxLimits, output: int) -> NoReturn:
    """Runs `source` and writes up to two lines of JSON to `output`: `{"lines": n}` once n lines of it have compiled,
    and `{"reason", "value", "output"}`. The value is an int, float or str, of exactly that type; 1 for a solution that
    passes its `exam`.
    """
    try:
        output = jail.enter(limits, output)
        reserve = bytearray(4 << 20)  # freed when there is no memory left to report that
    except BaseException:  # of the machine: no descriptors, no memory
        os._exit(NOT_STARTED)
    try:
        send: Send = lambda message: _write(output, message)  # noqa: E731
        message = _answer(source, limits, send) if exam is None else _examine(source, exam, limits, send)
    except MemoryError:
        del reserve
        os.write(output, _OUT_OF_MEMORY)
    except BaseException as error:
        _write(output, {"reason": "error", "value": None, "output": explain(error)})
    else:
        _write(output, message)
    os._exit(0)


def _answer(source: str, limits: SandboxLimits, send: Send) -> dict[str, Any]:
    try:
        tree, lines = parse(source)
    except SyntaxError as error:
        return _failed("syntax", explain(error))
    send({"lines": lines})
    function = find_entry(tree)
    if function is None:
        is_cut = lines < source.count("\n") + 1
        return _failed("syntax" if is_cut else "no_program", "no function that can be called without arguments")
    if limits.has("check"):
        try:
            check(tree)
        except Blocked as blocked:
            return _failed("blocked", str(blocked))
    return _call(tree, function, limits, send)


def _examine(source: str, exam: Exam, limits: SandboxLimits, send: Send) -> dict[str, Any]:
    """Answers for a solution and its tests. All of a solution must compile: it is what a benchmark would run."""
    tree = compiled(source)
    if isinstance(tree, SyntaxError):
        return _failed("syntax", explain(tree))
    send({"lines": source.count("\n") + 1})
    sink = _Sink()

    def lock() -> None:
        sys.stdout = sys.stderr = sink
        if limits.has("audit"):
            sys.addaudithook(_end_at_any_attempt(send, _QUIET_EVENTS | {"builtins.id"}))  # which copy.deepcopy calls

    try:
        take(tree, exam, lock, limits.has("check"))
    except Blocked as blocked:
        return _failed("blocked", str(blocked))
    except BadExam as error:
        return _failed("error", str(error))
    except AssertionError as error:
        return _failed("wrong", explain(error))
    return {"reason": "ran", "value": 1, "output": sink.text}


def _call(
    tree: ast.Module, function: str, limits: SandboxLimits, send: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    scope: dict[str, Any] = namespace() if limits.has("check") else {"__name__": "program"}
    sys.stdout = sys.stderr = sink = _Sink()
    code = compile(tree, "<program>", "exec")
    if limits.has("audit"):
        sys.addaudithook(_end_at_any_attempt(send))
    exec(code, scope)
    value = scope[function]()
    kind = type(value)
    if kind is int and int.bit_length(value) > 1024:
        return _failed("error", f"a result of {int.bit_length(value)} bits")
    if kind is int or kind is float or (kind is str and len(value) <= MAX_OUTPUT):
        return {"reason": "ran", "value": value, "output": sink.text}
    return _failed("error", "a string too long to be a number" if kind is str else f"returned a {kind.__name__}")


def _end_at_any_attempt(send: Send, quiet: frozenset[str] = _QUIET_EVENTS) -> Callable[[str, tuple[Any, ...]], None]:
    """Makes an audit hook: files, sockets, processes, imports, frames, .. end the program: no `except` hides them."""

    def hook(event: str, _: tuple[Any, ...]) -> None:
        if event not in quiet:
            send(_failed("blocked", event))
            os._exit(0)

    return hook


def explain(error: BaseException) -> str:
    """Formats any error as `ZeroDivisionError: division by zero`, whatever its `__str__` does."""
    kind = type(error).__name__
    try:
        text = str(error)[:MAX_OUTPUT]
    except Exception:
        text = ""
    return f"{kind}: {text}"[:MAX_OUTPUT] if text else kind


def _failed(reason: str, output: str) -> dict[str, Any]:
    return {"reason": reason, "value": None, "output": output[:MAX_OUTPUT]}


def _write(output: int, message: dict[str, Any]) -> None:
    os.write(output, json.dumps(message).encode() + b"\n")
