"""Benchmarks of others, asked of a model of text: multiple choice by likelihood, code by what it writes."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import lines, run_cli
from tests.helpers.runs import tiny_run
from tests.helpers.text import write_lines
from unmask.errors import UserError
from unmask.tasks.choices import read_questions
from unmask.tasks.code import find_completion
from unmask.tasks.programs.problems import read_code_problems

TEXT = ["task.name=text", "process.name=uniform", "data.length=96", "train.dtype=float64"]
QUESTIONS: list[dict[str, Any]] = [
    {"question": "Is it?", "choices": ["yes", "no", "perhaps so"], "answer": 1},
    {"context": "They sit. They", "choices": ["stand up.", "stand."], "answer": "stand."},
    {"ctx": "One, two,", "endings": ["three", "four", "5"], "label": "0"},
]
PROBLEM = {
    "task_id": "X/0",
    "prompt": "def two():\n",
    "entry_point": "two",
    "test": "def check(candidate):\n    assert candidate() == 2\n",
}


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    write_lines(folder / "text.jsonl", [{"text": f"They sit. They stand up {n}. " * 9} for n in range(60)])
    tiny_run(folder / "run", *TEXT, f"data.path={folder / 'text.jsonl'}", f"data.cache_dir={folder}").train()
    return folder / "run"


def test_multiple_choice(text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write_lines(tmp_path / "q.jsonl", QUESTIONS), tmp_path / "out.jsonl"
    command = ["eval", text_run, "--task", "multiple_choice", "--data", file, "--draws", 8]
    assert run_cli(*command, "--json", "--out", out, "--against", text_run) == 0
    result = json.loads(capsys.readouterr().out)
    rows = lines(out)
    assert [row["answer"] for row in rows] == [1, 1, 0]
    assert rows[0]["context"] == "Question: Is it?\nAnswer:"
    assert [row["chosen"] for row in rows] == [row["loglikelihood"].index(max(row["loglikelihood"])) for row in rows]
    right = [row["chosen"] == row["answer"] for row in rows]
    per_character = [
        [value / len(choice.strip()) for value, choice in zip(row["loglikelihood"], row["choices"], strict=True)]
        for row in rows
    ]
    right_norm = [values.index(max(values)) == row["answer"] for values, row in zip(per_character, rows, strict=True)]
    assert result["shares"] == {"likelihood": {"accuracy": sum(right) / 3, "acc_norm": sum(right_norm) / 3}}
    assert result["loglikelihood_stderr"] > 0
    assert result["protocol"]["draws"] == 8
    assert result["against"]["measures"]["likelihood"]["difference"]["value"] == 0
    assert run_cli(*command) == 0
    assert "the same masks for all choices of a question; standard error" in " ".join(capsys.readouterr().out.split())


WRONG = {
    "no choices": ({"question": "?", "answer": 0}, "line 1: needs `choices`: a list of two strings or more"),
    "one choice": ({"question": "?", "choices": ["a"], "answer": 0}, "needs `choices`"),
    "an empty choice": ({"question": "?", "choices": ["a", " "], "answer": 0}, "none of them empty"),
    "no question": ({"choices": ["a", "b"], "answer": 0}, "needs the string `question`"),
    "two of them": ({"question": "?", "ctx": "x", "choices": ["a", "b"], "answer": 0}, "has `question` and `ctx`"),
    "beyond": (
        {"question": "?", "choices": ["a", "b"], "answer": 2},
        "answer='2': must be the number of a choice, 0 to 1",
    ),
    "a bool": ({"question": "?", "choices": ["a", "b"], "answer": True}, "answer='True'"),
    "no answer": ({"question": "?", "choices": ["a", "b"]}, "answer='None'"),
    "twice": (
        {"question": "?", "choices": ["a", "a"], "answer": "a"},
        "line 1: `choices` has the right one, 'a', twice",
    ),
    "twice, by number": ({"question": "?", "choices": ["b", "a ", "a"], "answer": 2}, "the right one, 'a', twice"),
}


@pytest.mark.parametrize(("row", "message"), WRONG.values(), ids=WRONG.keys())
def test_bad_questions(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_questions(write_lines(tmp_path / "q.jsonl", [row]))
    assert message in str(caught.value)


def test_a_wrong_choice_may_be_there_twice(tmp_path: Path) -> None:
    row = {"question": "?", "choices": ["a", "b", "a"], "answer": "b"}
    assert read_questions(write_lines(tmp_path / "q.jsonl", [row]))[0].answer == 1


def test_a_choice_that_does_not_fit_is_named(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"question": "?", "choices": ["a", "b" * 96], "answer": 0}
    file = write_lines(tmp_path / "q.jsonl", [*QUESTIONS, row])
    assert run_cli("eval", text_run, "--task", "multiple_choice", "--data", file) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"q.jsonl, line 4: choice 1, {'b' * 40!r}: has 97 tokens, and the model reads 96" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "multiple_choice"], "--task multiple_choice: needs --data FILE with a question in each row"),
        (["--task", "multiple_choice", "--decoder", "prob"], "--decoder: multiple choice is answered by likelihood"),
        (["--draws", 4], "--draws 4: goes with --task multiple_choice or --questions"),
        (["--task", "mbpp"], "the problems of mbpp come with no package; name their file"),
    ],
)
def test_bad_options(arguments: list[Any], message: str, text_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("eval", text_run, *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_code_is_graded_as_unmask_grade_does(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = [PROBLEM, PROBLEM | {"task_id": "X/1", "test": "def check(candidate):\n    pass\n"}]
    file, out = write_lines(tmp_path / "p.jsonl", problems), tmp_path / "out.jsonl"
    decoder = ["--decoder", "prob,tokens_per_step=48"]
    assert run_cli("eval", text_run, "--task", "humaneval", "--data", file, "--out", out, "--json", *decoder) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["task_id"] for row in lines(out)] == ["X/0", "X/1"]
    assert lines(out)[0]["prompt"] == PROBLEM["prompt"]
    assert run_cli("grade", out, "--task", "humaneval", "--problems", file, "--json") == 0
    assert json.loads(capsys.readouterr().out)["pass@1"] == result["accuracy"]["prob/48"]
    assert result["protocol"]["task"] == "humaneval"


WHOLE = "def two():\n    return 2\n"
ANSWERS = {
    "goes on": ("    return 2\n\ndef three():\n    return 3\n", "    return 2\n"),
    "goes on to the end": ("    return 2", "    return 2"),
    "stops at a test": ("    x = 2\n    return x\nprint(two())\n", "    x = 2\n    return x\n"),
    "a fence": (f"Here:\n```python\n{WHOLE}```\nDone.", f"    pass\n\n{WHOLE}\n"),
    "the whole": (f"{WHOLE}[DONE]\nand more", f"    pass\n\n{WHOLE}\n"),
    "nothing": ("", ""),
}


@pytest.mark.parametrize(("text", "code"), ANSWERS.values(), ids=ANSWERS.keys())
def test_code_is_found_in_an_answer(text: str, code: str, tmp_path: Path) -> None:
    problems = read_code_problems("humaneval", write_lines(tmp_path / "p.jsonl", [PROBLEM]))
    found = find_completion(text, problems["X/0"])
    assert found.replace("\n\n\n", "\n\n").rstrip("\n") == code.rstrip("\n")
