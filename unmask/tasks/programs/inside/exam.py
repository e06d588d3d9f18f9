"""Runs a solution and the tests that it has to pass, each in globals of its own.

The tests call what the solution defines; nothing else of it is in their reach, so that a solution that gives `abs` or
`math.fabs` another meaning gives it to itself alone.
"""

import ast
import bisect
import builtins
import collections
import copy
import hashlib
import heapq
import itertools
import operator
import random
import re
import string
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .check import ALL_BUILTINS, PROGRAMS, Blocked, Rules, check, compiled, namespace


@dataclass(frozen=True)
class Exam:
    """The tests of a solution.

    Attributes:
        tests: code that fails, by an assertion or another error, unless the solution is right.
        setup: code that runs before the tests, in their globals.
        names: what the tests are given of the solution, even where `setup` defines it. They also get each name that
            they read, and that is neither theirs nor Python's.
    """

    tests: str
    setup: str = ""
    names: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises `BadExam` unless all of it compiles. Runs nothing."""
        _read(self.setup, "setup", is_checked=False)
        _read(self.tests, "tests", is_checked=False)


class BadExam(Exception):
    """The error of tests, not of the solution, that cannot be run; the message says which and why."""


_MODULES: dict[Any, str] = {  # no `attrgetter` and `methodcaller`: they reach what the check hides
    bisect: "bisect bisect_left bisect_right insort insort_left insort_right",
    copy: "copy deepcopy",
    hashlib: "md5 sha1 sha224 sha256 sha384 sha512",
    heapq: "heapify heappop heappush heappushpop heapreplace merge nlargest nsmallest",
    operator: "add and_ contains eq floordiv ge gt itemgetter le lt mod mul ne neg not_ or_ pow sub truediv xor",
    random: "Random choice choices randint random randrange sample seed shuffle uniform",
    re: "I IGNORECASE M MULTILINE S compile escape findall finditer fullmatch match search split sub subn",
    string: "ascii_letters ascii_lowercase ascii_uppercase digits hexdigits octdigits punctuation whitespace",
    sys: "maxsize setrecursionlimit",
}


def _type_of(value: Any) -> Any:
    return builtins.type(value)


def _evaluate(source: Any, scope: Any = None, names: Any = None) -> Any:
    """Evaluates an expression that passes the check; it sees no names but those that it is given."""
    tree = ast.parse(source.strip(), mode="eval")
    check(tree, SOLUTIONS)
    safe = namespace(SOLUTIONS) | dict(scope or {})
    return eval(compile(tree, "<eval>", "eval"), safe, names)


_OWN_BUILTINS: dict[str, Any] = {
    "eval": _evaluate,
    "type": _type_of,
    **{name: getattr(builtins, name) for name in ("object", "property", "staticmethod", "classmethod", "hasattr")},
    "__build_class__": builtins.__build_class__,
}
SOLUTIONS = Rules(
    PROGRAMS.modules
    | {module: frozenset(names.split()) for module, names in _MODULES.items()}
    | {collections: PROGRAMS.modules[collections] | {"ChainMap"}, itertools: PROGRAMS.modules[itertools]},
    _OWN_BUILTINS,
    # No comparison and no arithmetic: a value that equals everything would pass all tests.
    frozenset(("__init__", "__repr__", "__str__")),
)
"""The rules of solutions, and of their tests."""


def take(solution: ast.Module, exam: Exam, before_running: Callable[[], None], is_checked: bool) -> None:
    """Runs the solution, then the tests.

    Raises:
        Blocked: the solution says what it may not.
        AssertionError: it is wrong.
        BadExam: the tests cannot be run.
        BaseException: any other error of the solution's.
    """
    parts = {"setup": _read(exam.setup, "setup", is_checked), "tests": _read(exam.tests, "tests", is_checked)}
    if is_checked:
        check(solution, SOLUTIONS)
    before_running()
    random.seed(0)  # so that a solution has one result
    own: dict[str, Any] = namespace(SOLUTIONS) if is_checked else {"__name__": "program"}
    scope: dict[str, Any] = namespace(SOLUTIONS) if is_checked else {"__name__": "tests"}
    exec(compile(solution, "<solution>", "exec"), own)
    random.seed(0)
    exec(compile(parts["setup"], "<setup>", "exec"), scope)
    wanted = {name for name in _read_names(parts["tests"]) if name not in scope and name not in ALL_BUILTINS}
    for name in wanted | set(exam.names):
        if name in own:
            scope[name] = own[name]
        elif name in exam.names:
            raise NameError(f"the solution does not define {name}")
    exec(compile(parts["tests"], "<tests>", "exec"), scope)


def _read(source: str, what: str, is_checked: bool) -> ast.Module:
    tree = compiled(f"{source}\npass\n")  # nothing, or comments alone, are sound too
    if isinstance(tree, SyntaxError):
        raise BadExam(f"the {what} of this problem cannot be compiled: {tree}")
    if is_checked:
        try:
            check(tree, SOLUTIONS)
        except Blocked as blocked:
            raise BadExam(f"the {what} of this problem may not say: {blocked}") from blocked
    return tree


def _read_names(tree: ast.Module) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
