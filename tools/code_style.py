"""How a package reads, in numbers: sizes of files and functions, jumps, comments, docstrings that open with a fragment.

python tools/code_style.py [FOLDER ...] [--json | --list]

One row for each folder (default: unmask). Folders and files of tests are left out.

* Lines are all lines of a file. Empty files (`__init__.py`) count as files, but not for the median.
* A function is a `def` at any depth, without its decorators; its length includes its docstring.
* A private function (one leading underscore) has one use if its file names it once, other than where it is defined.
  Their share is of all functions.
* A comment line is one that holds a comment, be it after code or alone.
* A docstring of a module, class or function opens with a fragment if its first word is in `FRAGMENTS`.
"""

import argparse
import ast
import io
import json
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

FRAGMENTS = frozenset({"Of", "What", "How", "Whether", "Which", "Who", "As", "Where"})
LONG_FILE, TINY_FUNCTION, NUM_LONGEST = 400, 3, 10
COLUMNS = {
    "files": "files",
    "not_empty": "not empty",
    "lines": "lines",
    "file_p50": "file p50",
    "file_max": "longest file",
    "over_400": f"files over {LONG_FILE}",
    "function_p50": "function p50",
    "function_max": "longest function",
    "per_100": "functions per 100 lines",
    "one_use": "private with one use",
    "comments": "comment lines",
    "fragments": "docstrings that open with a fragment",
}
SHARES = ("one_use", "comments", "fragments")


@dataclass
class Function:
    """A function or method: its name, where it is, its length in lines, and how often its file names it."""

    name: str
    where: str
    lines: int
    uses: int

    @property
    def is_used_once(self) -> bool:
        """True if it is private and its file names it once, other than where it is defined."""
        return self.name.startswith("_") and not self.name.startswith("__") and self.uses == 1


@dataclass
class Package:
    """All that was counted in a folder."""

    files: dict[str, int] = field(default_factory=dict)  # lines by path
    functions: list[Function] = field(default_factory=list)
    docstrings: list[tuple[str, str]] = field(default_factory=list)  # where, first line
    comments: int = 0  # lines

    @classmethod
    def read(cls, folder: Path) -> "Package":
        package = cls()
        for path in source_files(folder):
            package.add(path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8"))
        return package

    def add(self, name: str, text: str) -> None:
        self.files[name] = text.count("\n") + (not text.endswith("\n") and bool(text))
        self.comments += count_comment_lines(text)
        nodes = list(ast.walk(ast.parse(text)))
        uses = Counter(name_of(node) for node in nodes)
        for node in nodes:
            where = f"{name}:{getattr(node, 'lineno', 1)}"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                self.functions.append(Function(node.name, where, lines, uses[node.name]))
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
                docstring := ast.get_docstring(node)
            ):
                self.docstrings.append((where, docstring.splitlines()[0]))

    @property
    def fragments(self) -> list[tuple[str, str]]:
        return [(where, text) for where, text in self.docstrings if text.split()[0].strip(",:;.") in FRAGMENTS]

    def measures(self) -> dict[str, int | float]:
        """Returns the numbers of a row, keyed as in `COLUMNS`."""
        sizes = [size for size in self.files.values() if size]
        lengths = [function.lines for function in self.functions]
        num_lines = sum(sizes)
        return {
            "files": len(self.files),
            "not_empty": len(sizes),
            "lines": num_lines,
            "file_p50": median(sizes or [0]),
            "file_max": max(sizes, default=0),
            "over_400": sum(size > LONG_FILE for size in sizes),
            "function_p50": median(lengths or [0]),
            "function_max": max(lengths, default=0),
            "per_100": 100 * len(lengths) / max(num_lines, 1),
            "one_use": sum(each.is_used_once for each in self.functions) / max(len(lengths), 1),
            "comments": self.comments / max(num_lines, 1),
            "fragments": len(self.fragments) / max(len(self.docstrings), 1),
        }

    def listing(self) -> dict[str, list[str]]:
        """Returns the names behind the numbers, by heading."""
        files = sorted(self.files.items(), key=lambda item: -item[1])[:NUM_LONGEST]
        functions = sorted(self.functions, key=lambda each: -each.lines)[:NUM_LONGEST]
        tiny = [each for each in self.functions if each.is_used_once and each.lines <= TINY_FUNCTION]
        return {
            "longest files": [f"{lines:5}  {name}" for name, lines in files],
            "longest functions": [f"{each.lines:5}  {each.where} {each.name}" for each in functions],
            f"private, {TINY_FUNCTION} lines or fewer, one use": [f"{each.where} {each.name}" for each in tiny],
            "docstrings that open with a fragment": [f"{where} {text}" for where, text in self.fragments],
        }


def source_files(folder: Path) -> Iterator[Path]:
    """Yields the Python files of `folder`, tests apart."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if not any(part in ("test", "tests", "__pycache__") for part in parts) and not path.name.startswith("test_"):
            yield path


def count_comment_lines(text: str) -> int:
    return sum(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(text).readline))


def name_of(node: ast.AST) -> str:
    """Returns `f` for the name `f` and for `a.b.f`; an empty string for other nodes."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def written(key: str, value: float) -> str:
    if key in SHARES:
        return f"{value:.1%}"
    return f"{value:.1f}" if key == "per_100" else f"{value:,g}"


def table(rows: dict[str, dict[str, int | float]]) -> str:
    head = ["| package | " + " | ".join(COLUMNS.values()) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    return "\n".join(
        head
        + [f"| {name} | " + " | ".join(written(key, row[key]) for key in COLUMNS) + " |" for name, row in rows.items()]
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("unmask")], help="default: unmask")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object: numbers (and with --list, names) by folder"
    )
    parser.add_argument(
        "--list", action="store_true", help="also name files, functions and docstrings behind the numbers"
    )
    options = parser.parse_args(arguments)
    for folder in options.folders:
        if not folder.is_dir():
            parser.error(f"{folder}: is not a folder")
    packages = {str(folder): Package.read(folder) for folder in options.folders}
    rows = {name: package.measures() for name, package in packages.items()}
    if options.json:
        listings: dict[str, Any] = {
            name: package.listing() if options.list else {} for name, package in packages.items()
        }
        print(json.dumps({name: row | listings[name] for name, row in rows.items()}, indent=1))
        return
    print(table(rows))
    for name, package in packages.items() if options.list else ():
        for heading, entries in package.listing().items():
            print("\n".join([f"\n{name}: {heading} ({len(entries)})", *entries]))


if __name__ == "__main__":
    main()
