"""One program, in its own locked-up process: parse, check, call, say what came out."""

import ast
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from . import jail, names
from .check import Blocked, check
from .parsing import entry, parse
from .settings import Settings

MAX_OUTPUT = 500
"""Characters of what it printed, or of why it failed, that are kept."""

_OUT_OF_MEMORY = b'{"reason": "memory", "value": null, "output": "needs more memory than it may have"}\n'
_QUIET_EVENTS = frozenset(("exec", "compile", "object.__getattr__", "object.__setattr__", "object.__delattr__"))


class _Sink:
    """Stands for stdout and stderr; keeps the beginning."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text[: MAX_OUTPUT - len(self.text)]
        return len(text)

    def flush(self) -> None: ...


def run(source: str, settings: Settings, output: int) -> NoReturn:
    """Runs `source` and writes up to two lines of JSON to `output`: `{"lines": n}` once n lines of it have compiled,
    and `{"reason", "value", "output"}`. The value is an int, float or str, of exactly that type.
    """
    output = jail.enter(settings, output)
    reserve = bytearray(4 << 20)  # freed when there is no memory left to say so
    try:
        message = _answer(source, settings, lambda said: _say(output, said))
    except MemoryError:
        del reserve
        os.write(output, _OUT_OF_MEMORY)
    except BaseException as error:
        _say(output, {"reason": "error", "value": None, "output": explain(error)})
    else:
        _say(output, message)
    os._exit(0)


def _answer(source: str, settings: Settings, say: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    try:
        tree, lines = parse(source)
    except SyntaxError as error:
        return _failed("syntax", explain(error))
    say({"lines": lines})
    function = entry(tree)
    if function is None:
        is_cut = lines < source.count("\n") + 1
        return _failed("syntax" if is_cut else "no_program", "no function that can be called without arguments")
    if not settings.call:
        return _failed("ran", "")
    if settings.has("check"):
        try:
            check(tree)
        except Blocked as blocked:
            return _failed("blocked", str(blocked))
    return _call(tree, function, settings, say)


def _call(tree: ast.Module, function: str, settings: Settings, say: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    scope: dict[str, Any] = names.namespace() if settings.has("check") else {"__name__": "program"}
    sys.stdout = sys.stderr = sink = _Sink()
    code = compile(tree, "<program>", "exec")
    if settings.has("audit"):
        sys.addaudithook(_end_at_any_attempt(say))
    exec(code, scope)
    value = scope[function]()
    kind = type(value)
    if kind is int and int.bit_length(value) > 1024:
        return _failed("error", f"a result of {int.bit_length(value)} bits")
    if kind is int or kind is float or (kind is str and len(value) <= MAX_OUTPUT):
        return {"reason": "ran", "value": value, "output": sink.text}
    return _failed("error", "a string too long to be a number" if kind is str else f"returned a {kind.__name__}")


def _end_at_any_attempt(say: Callable[[dict[str, Any]], None]) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook: files, sockets, processes, imports, frames, .. end the program, so that no `except` hides them."""

    def hook(event: str, _: tuple[Any, ...]) -> None:
        if event not in _QUIET_EVENTS:
            say(_failed("blocked", event))
            os._exit(0)

    return hook


def explain(error: BaseException) -> str:
    """`ZeroDivisionError: division by zero`, for any error, whatever its text does."""
    kind = type(error).__name__
    try:
        text = str(error)[:MAX_OUTPUT]
    except Exception:
        text = ""
    return f"{kind}: {text}"[:MAX_OUTPUT] if text else kind


def _failed(reason: str, output: str) -> dict[str, Any]:
    return {"reason": reason, "value": None, "output": output[:MAX_OUTPUT]}


def _say(output: int, message: dict[str, Any]) -> None:
    os.write(output, json.dumps(message).encode() + b"\n")
