"""`unmask grade` as a user types it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import lines, run_cli

ROWS: list[dict[str, Any]] = [
    {"question": "9 + 9?", "program": "def simple_math_problem():\n    return 9 + 9", "answer": "Adding.\n#### 18"},
    {"question": "?", "program": "```python\ndef how_much() -> float:\n    return '$1,800'\n```", "answer": "1800"},
    {"program": "def f():\n    return 3", "answer": 4, "more": [1]},
    {"program": "def f():\n    return 1 / 0", "answer": 4.5},
    {"program": "It is 4.", "answer": "$4"},
    {"program": "import os\n\ndef f():\n    return os.getpid()", "answer": 4},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("grade", write(tmp_path / "x.jsonl", ROWS), "--json") == 0
    grade = json.loads(capsys.readouterr().out)
    assert {key: grade[key] for key in ("n", "correct", "accuracy")} == {"n": 6, "correct": 2, "accuracy": 2 / 6}
    assert grade["reasons"] == {"wrong": 1, "error": 1, "no_program": 1, "blocked": 1}
    assert grade["interval"] == pytest.approx([0.0968, 0.7], abs=1e-3)


def test_text_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write(tmp_path / "x.jsonl", ROWS), tmp_path / "graded.jsonl"
    assert run_cli("grade", file, "--task", "gsm8k", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "2 of 6 right: 33.3% (95% interval 9.7% to 70.0%)" in printed
    assert "  blocked: 1" in printed
    graded = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["reason"] for row in graded] == ["correct", "correct", "wrong", "error", "no_program", "blocked"]
    assert [row["correct"] for row in graded] == [True, True] + [False] * 4
    assert graded[3]["output"] == "ZeroDivisionError: division by zero"
    assert graded[2] == ROWS[2] | {"value": 3.0, "output": "", "correct": False, "reason": "wrong"}
    assert run_cli("grade", file, "--out", out) == 2
    assert "exists already; name another file" in capsys.readouterr().err


GOOD = {"program": "def f():\n    return 1", "answer": 1}
BAD = {
    "not JSON": ("{", "line 2: not JSON"),
    "deep": ("[" * 100_000, "line 2: nested too deeply"),
    "a list": ("[]", "line 2: holds no JSON object: []"),
    "no program": ('{"answer": 1}', "line 2: needs the string `program`"),
    "program": ('{"program": 3, "answer": 1}', "line 2: needs the string `program`"),
    "question": ('{"question": 3, "program": "", "answer": 1}', "line 2: question=3 must be a string"),
    "no answer": ('{"program": ""}', "line 2: needs `answer`: a number, or a text that ends in `#### 18`"),
    "null": ('{"program": "", "answer": null}', "line 2: needs `answer`"),
    "bool": ('{"program": "", "answer": true}', "line 2: needs `answer`"),
    "words": ('{"program": "", "answer": "#### many"}', "line 2: answer: 'many' is not a number; use a number"),
    "nan": ('{"program": "", "answer": NaN}', "line 2: not JSON: NaN is no JSON number"),
    "two numbers": ('{"program": "", "answer": "5 and 10.\\n#### 5, 10"}', "line 2: answer: '5, 10' is not a number"),
    "no thousands": ('{"program": "", "answer": "#### 1,5"}', "line 2: answer: '1,5' is not a number"),
    "glued": ('{"program": "", "answer": "#### 2%1"}', "line 2: answer: '2%1' is not a number"),
    "huge": (f'{{"program": "", "answer": {"9" * 400}}}', "is too large"),
}


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD.keys())
def test_bad_lines(line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "x.jsonl", tmp_path / "graded.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    assert run_cli("grade", path, "--out", out) == 2
    printed = capsys.readouterr().err
    assert message in " ".join(printed.split())
    assert "x.jsonl, line 2" in printed
    assert "Traceback" not in printed
    assert not out.exists()


def test_nothing_to_grade(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text("\n")
    assert run_cli("grade", tmp_path / "x.jsonl") == 2
    assert "holds no program" in capsys.readouterr().err
    assert run_cli("grade", tmp_path / "nowhere.jsonl") == 2
    assert "nowhere.jsonl: cannot be read" in capsys.readouterr().err


def test_sudoku_shares_have_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """None of width 0, though nothing is right: of two wrong answers, a share of two thirds is possible."""
    full = "".join(str((3 * row + row // 3 + column) % 9 + 1) for row in range(9) for column in range(9))
    file = write(tmp_path / "x.jsonl", [{"puzzle": full, "answer": ""}] * 2)
    assert run_cli("grade", file, "--task", "sudoku") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "0 of 2 right: 0.0% (95% interval 0.0% to 65.8%)" in printed
    assert "0 of the 2 puzzles with one solution answered with it: 0.0% (95% interval 0.0% to 65.8%)" in printed
    assert run_cli("grade", file, "--task", "sudoku", "--json") == 0
    grade = json.loads(capsys.readouterr().out)
    assert grade["interval"] == grade["exact_interval"] == pytest.approx([0.0, 0.6576], abs=1e-4)
    assert (grade["n"], grade["correct"], grade["accuracy"]) == (2, 0, 0.0)


def test_sudoku_writes_each_row_with_its_verdict(tmp_path: Path) -> None:
    solved = "".join(str((3 * (row % 3) + row // 3 + column) % 9 + 1) for row in range(9) for column in range(9))
    rows = [{"id": 7, "puzzle": "." * 81, "answer": ""}, {"puzzle": "." + solved[1:], "answer": solved}]
    file, out = write(tmp_path / "x.jsonl", rows), tmp_path / "y.jsonl"
    assert run_cli("grade", file, "--task", "sudoku", "--out", out) == 0
    verdicts = {"correct": False, "reason": "wrong_length"}, {"correct": True, "reason": "correct"}
    assert lines(out) == [row | verdict for row, verdict in zip(rows, verdicts, strict=True)]
