"""Parses and checks programs before they run, and makes the Python that they get.

The check is not the wall that holds (that is `jail`): it makes an attempt a verdict, and keeps honest code to what
depends on it alone. Parsing is not safe to do in one's own process: deep nesting can crash the interpreter.
"""

import ast
import builtins
import collections
import datetime
import decimal
import fractions
import functools
import itertools
import math
import re
import statistics
import typing
import unicodedata  # noqa: F401 (the parser wants it for names beyond ASCII, when no file can be opened any more)
from dataclasses import dataclass
from string import Formatter
from types import ModuleType
from typing import Any

# No `type`, `object`, `getattr`, `vars`, `open`, `input`, `id`, `memoryview`, `super`, `__build_class__`, ..
_BUILTINS = """
abs all any ascii bin bool bytearray bytes callable chr complex dict divmod enumerate filter float format frozenset
hash hex int isinstance issubclass iter len list map max min next oct ord pow print range repr reversed round set slice
sorted str sum tuple zip Ellipsis NotImplemented
ArithmeticError AssertionError AttributeError BaseException EOFError Exception FloatingPointError GeneratorExit
ImportError IndexError KeyError KeyboardInterrupt LookupError MemoryError ModuleNotFoundError NameError
NotImplementedError OverflowError RecursionError RuntimeError StopIteration SystemExit TypeError
UnboundLocalError UnicodeError ValueError ZeroDivisionError
"""

_MODULES: dict[ModuleType, str] = {
    math: " ".join(name for name in dir(math) if not name.startswith("_")),
    itertools: " ".join(name for name in dir(itertools) if not name.startswith("_")),
    fractions: "Fraction",
    decimal: "Decimal ROUND_CEILING ROUND_DOWN ROUND_FLOOR ROUND_HALF_DOWN ROUND_HALF_EVEN ROUND_HALF_UP ROUND_UP",
    functools: "cache lru_cache partial reduce",
    collections: "Counter OrderedDict defaultdict deque",
    statistics: "fmean geometric_mean harmonic_mean mean median mode pstdev pvariance stdev variance",
    datetime: "date datetime time timedelta",
    typing: "Any Callable Dict Final Iterable Iterator List Optional Sequence Set Tuple Union",
}

SAFE_BUILTINS = frozenset(_BUILTINS.split())
ALL_BUILTINS = frozenset(dir(builtins))


@dataclass(frozen=True)
class Rules:
    """Rules of what code may say, beside what all may.

    Attributes:
        modules: the names that may be imported, by module.
        builtins: builtins beside `SAFE_BUILTINS`, by name.
        methods: methods with `__` that a class may define; None: there may be no classes.
    """

    modules: dict[ModuleType, frozenset[str]]
    builtins: dict[str, Any]
    methods: frozenset[str] | None = None

    @property
    def by_name(self) -> dict[str, frozenset[str]]:
        """Returns the names that may be imported, by the name of their module."""
        return {module.__name__: names for module, names in self.modules.items()}


PROGRAMS = Rules({module: frozenset(names.split()) for module, names in _MODULES.items()}, {})
"""The rules of programs that answer with a number."""


def namespace(rules: Rules = PROGRAMS) -> dict[str, Any]:
    """Makes the globals of a program. `__name__` is not `__main__`: its own tests do not run, as on an import."""
    safe = {name: getattr(builtins, name) for name in SAFE_BUILTINS}
    return {"__builtins__": safe | rules.builtins | {"__import__": _importer(rules)}, "__name__": "program"}


def _importer(rules: Rules) -> Any:
    modules = {module.__name__: _cut_down(module, names) for module, names in rules.modules.items()}

    def import_(name: str, _globals: Any = None, _locals: Any = None, _names: Any = (), level: int = 0) -> ModuleType:
        if level or name not in modules:
            raise ImportError(f"no module {name!r} for programs")
        return modules[name]

    return import_


def _cut_down(module: ModuleType, names: frozenset[str]) -> ModuleType:
    small = ModuleType(module.__name__)
    for name in names:
        setattr(small, name, getattr(module, name))
    return small


def parse(source: str) -> tuple[ast.Module, int]:
    """Parses the longest run of whole lines from the first on that compiles and holds code; returns it and its lines.

    Raises:
        SyntaxError: there is none; the error of the whole text.
    """
    lines = source.split("\n")
    first: SyntaxError | None = None
    while lines:
        tree = compiled("\n".join(lines))
        if isinstance(tree, ast.Module):
            return tree, len(lines)
        first = first or tree
        # What is wrong in line n stays wrong however many lines follow it, so all of them go.
        lines = lines[: min(len(lines) - 1, max((tree.lineno or 1) - 1, 0))]
    raise first or SyntaxError("no code")


def compiled(source: str) -> ast.Module | SyntaxError:
    """Parses a source that compiles and holds code; returns its error if it does not."""
    try:
        tree = ast.parse(source)
        compile(tree, "<program>", "exec")  # `return` outside a function is found only here
    except SyntaxError as error:
        return error
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes, lone surrogates, nesting
        return SyntaxError(str(error) or type(error).__name__)
    return tree if tree.body else SyntaxError("no code")


def find_entry(tree: ast.Module) -> str | None:
    """Finds the name of the last top-level function that can be called without arguments."""
    functions = (node for node in reversed(tree.body) if isinstance(node, ast.FunctionDef))
    for function in functions:
        arguments = function.args
        by_position = len(arguments.posonlyargs) + len(arguments.args)
        if by_position == len(arguments.defaults) and None not in arguments.kw_defaults:
            return function.name
    return None


_KINDS = (ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith, ast.Await)
_HIDDEN_NAME = re.compile(r"__")
_HIDDEN_ATTRIBUTE = re.compile(r"_|(gi|cr|ag|tb|co|f|func)_|(mro|format_map)$")  # frames, code, classes


class Blocked(Exception):
    """The error of a program that says what it may not; the message names it."""


def check(tree: ast.AST, rules: Rules = PROGRAMS) -> None:
    """Looks for anything that a program may not say.

    Raises:
        Blocked: it is there.
    """
    harmless = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and _formats_simply(node)}
    own = {name for node in ast.walk(tree) for name in _find_assigned(node)}
    for node in ast.walk(tree):
        if isinstance(node, _KINDS) or (isinstance(node, ast.ClassDef) and rules.methods is None):
            raise Blocked(type(node).__name__)
        if isinstance(node, ast.Import | ast.ImportFrom):
            _check_import(node, rules.by_name)
        elif isinstance(node, ast.Attribute):
            _check_attribute(node, is_harmless=id(node) in harmless)
        elif isinstance(node, ast.Name):
            _check_name(node, own | rules.builtins.keys())
        elif not (isinstance(node, ast.FunctionDef) and node.name in (rules.methods or ())):
            _check_identifiers(node)


def _check_import(node: ast.Import | ast.ImportFrom, known: dict[str, frozenset[str]]) -> None:
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "."]
    for module in modules:
        if module not in known:
            raise Blocked(f"import of {module}")
    for alias in node.names:
        if isinstance(node, ast.ImportFrom) and alias.name not in known[modules[0]] | {"*"}:
            raise Blocked(f"import of {modules[0]}.{alias.name}")
        if _HIDDEN_NAME.match(alias.asname or ""):
            raise Blocked(f"the name {alias.asname}")


def _check_attribute(node: ast.Attribute, is_harmless: bool) -> None:
    if _HIDDEN_ATTRIBUTE.match(node.attr) or (node.attr == "format" and not is_harmless):
        raise Blocked(f"the attribute .{node.attr}")


def _check_name(node: ast.Name, own: set[str]) -> None:
    is_main_test = node.id == "__name__" and isinstance(node.ctx, ast.Load)
    is_unsafe = node.id in ALL_BUILTINS - SAFE_BUILTINS and node.id not in own
    if not is_main_test and (is_unsafe or _HIDDEN_NAME.match(node.id)):
        raise Blocked(f"the name {node.id}")


def _check_identifiers(node: ast.AST) -> None:
    """Checks names that syntax holds as plain strings: of functions, arguments, keywords, `global`, patterns, .."""
    if isinstance(node, ast.Constant):
        return
    for _, value in ast.iter_fields(node):
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and _HIDDEN_NAME.match(name):
                raise Blocked(f"the name {name}")
    if isinstance(node, ast.MatchClass):
        raise Blocked("class patterns")


def _find_assigned(node: ast.AST) -> list[str]:
    """Finds the names that a node gives a meaning of the program's own."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, ast.arg):
        return [node.arg]
    return [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []


def _formats_simply(call: ast.Call) -> bool:
    """True if this is `"literal".format(..)` whose fields reach into no attribute or item."""
    function = call.func
    if not isinstance(function, ast.Attribute) or function.attr != "format":
        return False
    text = function.value.value if isinstance(function.value, ast.Constant) else None
    return isinstance(text, str) and _has_simple_fields(text)


def _has_simple_fields(text: str) -> bool:
    try:
        fields = list(Formatter().parse(text))
    except ValueError:
        return True  # it will fail when it runs
    return all(
        field is None or ((not field or field.isalnum() or field.isidentifier()) and _has_simple_fields(spec or ""))
        for _, field, spec, _ in fields
    )
