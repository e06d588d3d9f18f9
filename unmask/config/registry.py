"""The components that settings name: from a name to its class, and whose code may be imported.

Nothing is imported before it is asked for.
"""

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from unmask.config.settings import Section
from unmask.errors import UserError
from unmask.progress import warn

COMPONENTS = {
    "task": {
        "sudoku": "unmask.tasks.sudoku.task:Sudoku",
        "sudoku_moves": "unmask.tasks.sudoku.moves:SudokuMoves",
        "addition": "unmask.tasks.addition.task:Addition",
        "tokens": "unmask.tasks.tokens:Tokens",
        "text": "unmask.tasks.text:Text",
        "pretrained": "unmask.tasks.pretrained:Pretrained",
        "gsm8k": "unmask.tasks.gsm8k:Gsm8k",
        "chat": "unmask.tasks.chat:Chat",
        "toy": "unmask.tasks.toy:Toy",
    },
    "model": {
        "transformer": "unmask.models.transformer:Transformer",
    },
    "process": {
        "uniform": "unmask.masking.uniform:RandomMasking",
        "puma": "unmask.masking.puma:PumaPool",
        "puma_variable": "unmask.masking.puma_variable:VariablePumaPool",
        "ar": "unmask.masking.ar:NextToken",
    },
    "time": {
        "uniform": "unmask.masking.time:Uniform",
        "clipped": "unmask.masking.time:Clipped",
        "beta": "unmask.masking.time:Beta",
        "truncated_normal": "unmask.masking.time:TruncatedNormal",
        "logit_normal": "unmask.masking.time:LogitNormal",
        "table": "unmask.masking.time:Table",
        "mixture": "unmask.masking.time:Mixture",
    },
}

_PARTS = {"time": ("model_fields", "density")}
"""What makes a class a component, where that is not `Config` and `from_config`."""
_CALLED = {"time": "density"}
"""Words for kinds, where they are not the kind's name."""

_LIBRARIES = tuple(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib"))

_trusts_code: ContextVar[bool] = ContextVar("trusts_code", default=False)
_file: ContextVar[Path | None] = ContextVar("file", default=None)
_typed: ContextVar[frozenset[str]] = ContextVar("typed", default=frozenset())


def trust_code() -> None:
    """Allows importing what saved runs name, from now on in this context (one call of the command line, say)."""
    _trusts_code.set(True)


def trusts_code() -> bool:
    """True if `trust_code` was called in this context."""
    return _trusts_code.get()


@contextmanager
def found_in(file: Path) -> Iterator[None]:
    """Resolves names that the user did not type, but that a run, export or checkpoint holds in `file`.

    Looking at a stranger's run must not run the stranger's code. So inside, only those names are resolved that unmask
    ships, that an installed package registers, or that the user has typed; any other needs `trust_code`.
    """
    token = _file.set(file)
    try:
        yield
    finally:
        _file.reset(token)


def is_found() -> bool:
    """True inside `found_in`: settings are read that the user did not type."""
    return _file.get() is not None


def resolve(kind: str, name: str, key: str | None = None) -> Any:
    """Returns the class behind `name`: a shipped one, one that an installed package registers, or an import path.

    A package registers a class as an entry point `KIND.NAME` of the group `unmask`. An import path is written
    `package.module:Class`; its module is also looked for in the current folder. Errors call `key` the setting that
    holds the name; default: `KIND.name`.

    Raises:
        UserError: nothing of that name, its code fails or lacks a part, or a saved file names code that is not trusted.
    """
    key = key or f"{kind}.name"
    path = COMPONENTS[kind].get(name) or _registered(kind).get(name)
    if path is None:
        _check_import_path(kind, name, key)
    module, _, attribute = (path or name).partition(":")
    with foreign_code(kind, name, "cannot import it", key):
        component = getattr(_import(module, from_folder=path is None), attribute)
    if missing := [part for part in _PARTS.get(kind, ("Config", "from_config")) if not hasattr(component, part)]:
        what = _CALLED.get(kind, kind)
        raise UserError(f"{key}={name}: is not a {what}: it has no {' and no '.join(missing)}")
    _check_config(kind, name, _section(kind, component), key)
    return component


def about_owners(kind: str, own: str, setting: str, key: str) -> str | None:
    """Says which components of a kind have the `setting` that `own`, chosen by `key`, has not; None if none do."""
    sections = {name: _section(kind, resolve(kind, name)) for name in COMPONENTS[kind]}
    owners = [name for name, its in sections.items() if setting in its.model_fields or setting in its.aliases]
    if not owners:
        return None
    return f"is a setting of {key}={' or '.join(owners)}, and this is {own}; remove it, or set {key}"


def is_kind_of_task(name: str, other: str) -> bool:
    """True if the task `name` is `other`, or does all that `other` does as it does it; of those that come with us."""
    if name == other or not {name, other} <= COMPONENTS["task"].keys():
        return name == other
    return issubclass(resolve("task", name), resolve("task", other))


def build(kind: str, name: str, *arguments: Any) -> Any:
    """Builds the component `name` from `arguments`, the first of which are its settings.

    Raises:
        UserError: as `resolve`, or code that does not come with unmask fails at it.
    """
    component = resolve(kind, name)
    with foreign_code(kind, name, "cannot build it"):
        return component.from_config(*arguments)


def require_parts(kind: str, name: str, component: object, protocol: type) -> None:
    """Raises a `UserError` that names what `component` lacks of `protocol`."""
    parts = [part for base in protocol.__mro__ for part in (*vars(base), *vars(base).get("__annotations__", ()))]
    missing = {part for part in parts if not part.startswith("_") and not _has(component, part)}
    if missing:
        raise UserError(f"{kind}.name={name}: is not a {kind}: it has no {' and no '.join(sorted(missing))}")


def _has(component: object, part: str) -> bool:
    """True if `component` has `part`, which is not evaluated: a property may ask other processes."""
    try:
        inspect.getattr_static(component, part)
    except AttributeError:
        return hasattr(component, part)
    return True


@contextmanager
def foreign_code(kind: str, name: str, what: str, key: str | None = None) -> Iterator[None]:
    """Turns what is raised by code that does not come with unmask into a `UserError` that begins with its own line.

    The error calls `key` the setting that holds the name of the code's component; default: `KIND.name`.
    `sys.exit` is no way out of a command either: it would end with nothing done and, with 0, as if all were well.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if name in COMPONENTS[kind]:
            raise
        key = key or f"{kind}.name"
        if (place := own_line(error, name.partition(":")[0].partition(".")[0])) is None:
            raise UserError(f"{key}={name}: {what}: {error}") from error
        cause = f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"
        cause = f"sys.exit({error.code!r})" if isinstance(error, SystemExit) else cause
        raise UserError(f"{place}: {cause}\n{key}={name}: {what}; mend it there") from error


def own_line(error: BaseException, package: str = "") -> str | None:
    """Returns `FILE:LINE` of the code that raised `error` and is neither unmask's nor a library's; None if none is.

    The code of `package` counts although it may be installed among the libraries.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    libraries = (f"{Path(__file__).parents[1]}{os.sep}", "<", *_LIBRARIES)  # "<": no file, such as made by dataclasses
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(libraries)
        or package in (Path(frame.filename).stem, *Path(frame.filename).parts)
    ]
    own = [frame for frame in own if frame.filename == own[0].filename]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else None


def _section(kind: str, component: Any) -> Any:
    """Returns the class of a component's settings."""
    return component if kind == "time" else component.Config


def _check_config(kind: str, name: str, config: object, key: str) -> None:
    if not (isinstance(config, type) and issubclass(config, Section)):
        what = "it" if kind == "time" else "its Config"
        raise UserError(
            f"{key}={name}: is not a {_CALLED.get(kind, kind)}: {what} is no subclass of "
            f"unmask.config.settings.Section, but {config!r:.80}"
        )


def _registered(kind: str) -> dict[str, str]:
    """Returns the names that installed packages register, with their import paths."""
    points = metadata.entry_points(group="unmask")
    return {point.name.removeprefix(f"{kind}."): point.value for point in points if point.name.startswith(f"{kind}.")}


def _check_import_path(kind: str, name: str, key: str) -> None:
    """Refuses a name that is no import path, or one that a saved file holds and nobody trusts."""
    if ":" not in name:
        known = [*COMPONENTS[kind], *_registered(kind)]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        what = _CALLED.get(kind, kind)
        raise UserError(f"{key}={name}: no such {what}; {hint} (or an import path, package.module:Class)")
    file = _file.get()
    if file is None:
        _typed.set(_typed.get() | {name})
    elif name not in _typed.get():
        if not _trusts_code.get():
            raise UserError(
                f"{key}={name}: that is code which does not come with unmask, and to look at this run would run "
                "it; if you trust whoever made the run, add --trust-code (in Python: trust_code=True)"
            )
        module = name.partition(":")[0]
        warn(f"{file} names {name}: imported from {_origin(module)}")


def _origin(module: str) -> str:
    """Returns the file of a module that is about to be imported, as far as that is known before."""
    with _current_folder_searched(), suppress(ImportError, ValueError):
        found = importlib.util.find_spec(module.partition(".")[0])
        if found is not None:
            return str(found.origin or found.name)
    return "a place that is not found"


def _import(module: str, *, from_folder: bool) -> ModuleType:
    with _current_folder_searched() if from_folder else nullcontext():
        found = importlib.import_module(module)
    folder, file = Path.cwd(), getattr(found, "__file__", None)
    if from_folder and file and Path(file).is_relative_to(folder) and str(folder) not in sys.path:
        sys.path.append(str(folder))  # code of this folder may import its neighbours later, in a function
    return found


@contextmanager
def _current_folder_searched() -> Iterator[None]:
    """Searches the current folder last, and only meanwhile: what lies beside a run must not be imported by chance."""
    folder = str(Path.cwd())
    if folder in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
