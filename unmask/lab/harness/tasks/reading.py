"""Rows and metrics of this package's tasks for lm-evaluation-harness: as `unmask eval` reads files and runs code."""

import math
from pathlib import Path
from typing import Any

from datasets import Dataset

from unmask import paths
from unmask.errors import UserError
from unmask.progress import warn
from unmask.tasks.choices import read_questions
from unmask.tasks.code import find_completion
from unmask.tasks.programs.answers import parse_answer
from unmask.tasks.programs.grading import judge
from unmask.tasks.programs.problems import CodeProblem, find_problems, read_code_problems
from unmask.tasks.programs.solutions import judge_solutions
from unmask.tasks.text_rows import read_problems

Rows = dict[str, Dataset]
_DATA = "--metadata data="
_known: dict[str, CodeProblem] = {}


def _file(data: str | None) -> Path:
    if data is None:
        raise UserError(f"{_DATA}FILE: is missing; it names the rows of the task")
    return paths.existing_file(data, _DATA)


def gsm8k(data: str | None = None, **_: Any) -> Rows:
    """Reads GSM8K's own rows, or others with `question` and `answer`."""
    # Numbers as texts: a column of a data set has one type, and no integer of any size.
    rows = [{"question": each.question, "answer": str(each.answer)} for each in read_problems(_file(data))]
    return {"test": Dataset.from_list(rows)}


def multiple_choice(data: str | None = None, **_: Any) -> Rows:
    """Reads questions as `unmask eval --task multiple_choice` does."""
    rows = [
        {"context": each.context, "choices": [choice.strip() for choice in each.choices], "answer": each.answer}
        for each in read_questions(_file(data))
    ]
    return {"test": Dataset.from_list(rows)}


def humaneval(data: str | None = None, **_: Any) -> Rows:
    """Reads HumanEval's problems: those of the installed package, or of a file."""
    return _read_code("humaneval", data)


def mbpp(data: str | None = None, **_: Any) -> Rows:
    """Reads MBPP's problems."""
    return _read_code("mbpp", data)


def _read_code(benchmark: str, data: str | None) -> Rows:
    path = find_problems(benchmark, None if data is None else _file(data), _DATA)
    problems = read_code_problems(benchmark, path)
    _known.update({f"{benchmark}/{name}": problem for name, problem in problems.items()})
    rows = [{"key": f"{benchmark}/{name}", "prompt": own.prompt} for name, own in problems.items()]
    return {"test": Dataset.from_list(rows)}


def grade_program(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Grades an answer to GSM8K: its program returns the number."""
    (judgement,) = judge(results[:1], [parse_answer(doc["answer"])])
    return {"accuracy": _graded(judgement.reason, judgement.output)}


def grade_code(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Grades an answer to HumanEval or MBPP: its code passes the tests."""
    problem = _known[doc["key"]]
    (outcome,) = judge_solutions([problem], [find_completion(results[0], problem)])
    return {"pass@1": _graded(outcome.reason, outcome.output)}


def _graded(reason: str, output: str) -> float:
    if reason == "not_graded":
        warn(
            f"an answer could not be graded, so the score is nan: {output}; try again when more of the machine is free"
        )
        return math.nan  # neither right nor wrong; an error would lose all answers
    return float(reason == "correct")
