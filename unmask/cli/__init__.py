"""The boundary of the command line: signals, streams and exit codes, around the verbs of `cli/app.py`.

Exit codes: 0 done, 1 failed, 2 the user's input is wrong, 130 interrupted (a training run has saved by then), 141
nobody reads the output any more.
"""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from types import FrameType
from typing import Any, TypeVar, cast

from unmask.errors import Interrupted, RunFailed, UserError

T = TypeVar("T")

_STOPS = (signal.SIGTERM, signal.SIGHUP)
_INTERRUPTED = 130
_TRACEBACK = "--traceback"
_STRICT = ("strict", "surrogateescape")  # on a stream: what it cannot take is an error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    if sys.platform == "darwin":  # what its GPU cannot do is done on the CPU; PyTorch asks when it is imported
        os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    given = list(sys.argv[1:] if arguments is None else arguments)
    with _streams(), _signals():
        try:
            code = _run([word for word in given if word != _TRACEBACK])
            sys.stdout.flush()  # what is still in the buffer fails here, and not behind our back
            return code
        except BaseException as error:
            is_asked = _TRACEBACK in given or bool(os.environ.get("UNMASK_TRACEBACK"))
            return _report(error, with_traceback=is_asked)


def run() -> None:
    """Runs the console script `unmask`."""
    code = main()
    if code == _INTERRUPTED or _is_in_group():  # at once: an exit hook may wait for a compiler, say
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _is_in_group() -> bool:
    """True if this process could not leave its group, as it lost another: gloo's threads might abort it as it ends."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _run(arguments: list[str]) -> int:
    for word in arguments:
        if not _is_text(word):
            raise UserError(f"{os.fsencode(word)!r}: an argument that is not UTF-8; rename the file, or convert it")
    from unmask import machine
    from unmask.cli.app import app  # takes seconds, in which signals come too

    machine.use_threads()
    try:
        # A context of its own, so that what one call trusts is not trusted by the next.
        copy_context().run(app, arguments, prog_name="unmask")
    except SystemExit as stop:  # typer always ends so, also after a message about a wrong option
        if (hidden := _hidden_in(stop)) is not None:
            raise hidden from None
        from unmask.config.registry import own_line

        if (place := own_line(stop)) is not None:  # code of the user's own, which a verb has called
            raise RunFailed(f"{place}: sys.exit({stop.code!r}): the command did not finish") from stop
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _is_text(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def _hidden_in(stop: BaseException) -> BaseException | None:
    """Returns the error that typer has turned into an exit; None if the exit is its own or a verb's."""
    error = stop.__cause__ or stop.__context__
    while error is not None:
        if isinstance(error, KeyboardInterrupt | EOFError | BrokenPipeError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _report(error: BaseException, *, with_traceback: bool) -> int:
    """Prints an error as one line; returns the exit code."""
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    from unmask.progress import console

    if with_traceback:
        console.print("".join(traceback.format_exception(error)).rstrip())
    if isinstance(error, KeyboardInterrupt):
        console.print(str(error) or "Interrupted")
        return _INTERRUPTED
    code = 2 if isinstance(error, UserError) else 1
    words = str(error) if isinstance(error, UserError | RunFailed) else _in_one_line(error)
    console.print(f"Error: {words}", style="red")
    return code


def _in_one_line(error: BaseException) -> str:
    """Words what nobody has foreseen: a fault of the machine, or of this package."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        name = error.filename
        if name is None and isinstance(error, FileNotFoundError) and _is_nowhere():
            return "the current folder is gone; change to one that exists"
        if name is None:
            return f"{error.strerror}; {_TRACEBACK} shows where"
        return f"{os.fsdecode(name) if isinstance(name, bytes) else name}: {error.strerror}"
    is_memory = type(error).__name__ == "OutOfMemoryError" or "not enough memory" in text
    if isinstance(error, MemoryError) or is_memory:
        what = text.partition(". ")[0] or "out of memory"
        return f"the memory is full: {what}; use a smaller batch or model ({_TRACEBACK} shows where)"
    if isinstance(error, RecursionError):
        return f"something is nested too deeply: {text[:200]}; {_TRACEBACK} shows where"
    from unmask.config.registry import own_line

    words = f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__
    place = own_line(error) or "internal error"  # code of the user's own, which a verb has called
    return f"{place}: {words}; {_TRACEBACK} shows where"


def _is_nowhere() -> bool:
    """True if the current folder has been deleted."""
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        return True
    return False


class _Stdout:
    """The stream `sys.stdout`; an error of its writes names it. To write to one that was closed is an error as well."""

    def __init__(self, stream: Any, *, is_closed: bool) -> None:
        self._stream = stream
        self._is_closed = is_closed

    def write(self, text: str) -> int:
        if self._is_closed and text:
            raise OSError(errno.EBADF, "is closed, so the result is lost; open it, or redirect it to a file", "stdout")
        return self._named(self._stream.write, text)

    def flush(self) -> None:
        self._named(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _named(self, operate: Callable[..., T], *arguments: str) -> T:
        try:
            return operate(*arguments)
        except OSError as error:
            if (
                self._stream is sys.__stdout__ is not None
            ):  # what is left in its buffer would fail again when the process ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            error.filename = "stdout"
            raise


@contextmanager
def _streams() -> Iterator[None]:
    """Makes the standard streams take any text: signs that they cannot show become `?`.

    A closed stderr leads nowhere. Whatever is written to a closed stdout is an error.
    """
    is_closed = sys.stdout is None
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            while (descriptor := os.open(os.devnull, os.O_RDWR)) < number:
                pass
            setattr(sys, name, os.fdopen(descriptor, "w" if number else "r", encoding="utf-8"))
        elif (number or stream.isatty()) and getattr(stream, "errors", None) in _STRICT:
            getattr(stream, "reconfigure", dict)(errors="replace")  # what is piped in: see `paths.stdin_lines`
    stdout = sys.stdout
    sys.stdout = cast(Any, _Stdout(stdout, is_closed=is_closed))
    try:
        yield
    finally:
        sys.stdout = stdout


@contextmanager
def _signals() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP end the work as Ctrl-C does; a training has handlers of its own while it runs."""
    own = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:  # a child that was forked meanwhile
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise Interrupted(f"Interrupted by {signal.Signals(number).name}")

    before = {}
    with suppress(ValueError):  # not the main thread: signals are not ours
        for number in _STOPS:
            if signal.getsignal(number) == signal.SIG_DFL:  # `nohup` ignores SIGHUP
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
