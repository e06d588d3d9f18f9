"""What a program may not say, found before it runs.

Not the wall that holds (that is `jail`): it makes an attempt a verdict, and keeps honest code to what depends on it
alone.
"""

import ast
import re
from string import Formatter

from .names import ALL_BUILTINS, MODULES, SAFE_BUILTINS

_KINDS = (ast.ClassDef, ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith, ast.Await)
_HIDDEN_NAME = re.compile(r"__")
_HIDDEN_ATTRIBUTE = re.compile(r"_|(gi|cr|ag|tb|co|f|func)_|(mro|format_map)$")  # frames, code, classes


class Blocked(Exception):
    """A program says what it may not; the message names it."""


def check(tree: ast.Module) -> None:
    """Raises:
    Blocked: the program says what it may not.
    """
    harmless = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and _formats_simply(node)}
    own = {name for node in ast.walk(tree) for name in _assigned(node)}
    for node in ast.walk(tree):
        if isinstance(node, _KINDS):
            raise Blocked(type(node).__name__)
        if isinstance(node, ast.Import | ast.ImportFrom):
            _check_import(node)
        elif isinstance(node, ast.Attribute):
            _check_attribute(node, is_harmless=id(node) in harmless)
        elif isinstance(node, ast.Name):
            _check_name(node, own)
        else:
            _check_identifiers(node)


def _check_import(node: ast.Import | ast.ImportFrom) -> None:
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "."]
    for module in modules:
        if module not in MODULES:
            raise Blocked(f"import of {module}")
    for alias in node.names:
        if isinstance(node, ast.ImportFrom) and alias.name not in MODULES[modules[0]] | {"*"}:
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
    """Names that syntax holds as plain strings: of functions, arguments, keywords, `global`, patterns, .."""
    if isinstance(node, ast.Constant):
        return
    for _, value in ast.iter_fields(node):
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and _HIDDEN_NAME.match(name):
                raise Blocked(f"the name {name}")
    if isinstance(node, ast.MatchClass):
        raise Blocked("class patterns")


def _assigned(node: ast.AST) -> list[str]:
    """The names that a node gives a meaning of the program's own."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, ast.arg):
        return [node.arg]
    return [node.name] if isinstance(node, ast.FunctionDef) else []


def _formats_simply(call: ast.Call) -> bool:
    """Whether this is `"literal".format(..)` whose fields reach into no attribute or item."""
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
