"""From text to code. Parsing is not safe to do in one's own process: deep nesting can crash the interpreter."""

import ast
import unicodedata  # noqa: F401 (the parser wants it for names beyond ASCII, when no file can be opened any more)


def parse(source: str) -> tuple[ast.Module, int]:
    """The longest run of whole lines from the first on that compiles and holds code, and how many lines that is.

    Raises:
        SyntaxError: there is none; the error of the whole text.
    """
    lines = source.split("\n")
    first: SyntaxError | None = None
    while lines:
        tree = _compiled("\n".join(lines))
        if isinstance(tree, ast.Module):
            return tree, len(lines)
        first = first or tree
        # What is wrong in line n stays wrong however many lines follow it, so all of them go.
        lines = lines[: min(len(lines) - 1, max((tree.lineno or 1) - 1, 0))]
    raise first or SyntaxError("no code")


def _compiled(source: str) -> ast.Module | SyntaxError:
    try:
        tree = ast.parse(source)
        compile(tree, "<program>", "exec")  # `return` outside a function is found only here
    except SyntaxError as error:
        return error
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes, lone surrogates, nesting
        return SyntaxError(str(error) or type(error).__name__)
    return tree if tree.body else SyntaxError("no code")


def entry(tree: ast.Module) -> str | None:
    """The name of the last top-level function that can be called without arguments."""
    functions = (node for node in reversed(tree.body) if isinstance(node, ast.FunctionDef))
    return next((function.name for function in functions if _needs_nothing(function.args)), None)


def _needs_nothing(arguments: ast.arguments) -> bool:
    by_position = len(arguments.posonlyargs) + len(arguments.args)
    return by_position == len(arguments.defaults) and None not in arguments.kw_defaults
