"""The program is found in whatever surrounds it; nothing that a text holds crashes or stalls us."""

import ast
import random
import sys
from types import FrameType
from typing import Any

import pytest

from unmask.tasks.programs import grading
from unmask.tasks.programs.grading import judge, locate
from unmask.tasks.programs.inside.check import parse

F = "def f():\n    return 1"


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (F, F),
        (f"Let us see.\n{F}", F),
        (f"```python\n{F}\n```", F),
        (f"```\n{F}\n```\nSo it is 1.", F),
        (f"```python\n{F}", F),
        (f"Here:\n```Python3 \nimport math\n{F}\n```\n```python\ndef g():\n    return 2\n```", f"import math\n{F}"),
        (f"```python\nx = 1\n```\nand\n```python\n{F}\n```", F),
        (f"```bash\ndef ls\n```\n```python\n{F}\n```", F),
        (f"{F}\n```", F),
        (f"{F}\nThe answer is 1.\nIndeed.", F),
        (f"from here on it goes:\nimport math\nfrom math import pi\n\n{F}", f"import math\nfrom math import pi\n\n{F}"),
        (f"Total = 3 apples\nRATE = -2.5  # a day\n\n@cache\n{F}", f"RATE = -2.5  # a day\n\n@cache\n{F}"),
        (f"{F}\r\n", F + "\n"),
        ("def f():\n    a = 1\n    return a +", "def f():\n    a = 1"),
        ("def f():\n    a = (1 +\n    2", "def f():\n    a = (1 +\n    2"),  # nothing of it compiles
        ('def f():\n    return 1\n\ndef g():\n    """Never closed\n    return 2\n', F + "\n"),
        (f"  {F}", None),
        ("The answer is 3.", None),
        ("define\ndefault", None),
        ("```python\nprint(3)\n```", None),
        ("", None),
    ],
)
def test_extract(text: str, program: str | None) -> None:
    (judgement,) = judge([text], [1.0])
    assert judgement.program == program


LONG = """import math

def half(x):
    if x < 0:
        return -half(-x)
    else:
        return x / 2

def f():
    '''How many
    are left?'''
    total = [1, 2,
        3]
    for n in total:
        try:
            print(f"{n}", end="")
        finally:
            pass
    return half(math.fsum(
        total))
"""
NOISE = ["So it is 3.", "    x = (", "'''", "def g(:", "try:", "else:", "  odd", "print('a", ")", "\\", "for i in"]


def test_cutting_equals_dropping_one_line_at_a_time() -> None:
    """The shortcut, from an error to its line, against its definition. (Honest text is safe to parse here.)"""
    draw = random.Random(0)
    for _ in range(400):
        lines = LONG.split("\n")
        for _ in range(draw.randrange(3)):
            lines.insert(draw.randrange(len(lines) + 1), draw.choice(NOISE))
        text = "\n".join(lines)[: draw.randrange(1, len(LONG))]
        lines = text.split("\n")
        kept = next((n for n in range(len(lines), 0, -1) if compiles("\n".join(lines[:n]))), 0)
        try:
            assert parse(text)[1] == kept
        except SyntaxError:
            assert kept == 0


def compiles(text: str) -> bool:
    try:
        compile(text, "<text>", "exec")
    except SyntaxError:
        return False
    return bool(ast.parse(text).body)


HOSTILE = {
    "null byte": f"{F}\0",
    "lone surrogate": "def f():\n    return '\ud800'",
    "parentheses": "def f(): return " + "(" * 20_000,
    "closed parentheses": "def f(): return " + "(" * 20_000 + ")" * 20_000,
    "minus signs": "def f(): return " + "-" * 40_000 + "1",
    "nots": "def f(): return " + "not " * 12_000 + "1",
    "sums": "def f(): return " + "1+" * 20_000 + "1",
    "attributes": "def f(): return a" + ".a" * 20_000,
    "lambdas": "def f(): return " + "lambda: " * 6_000 + "1",
    "f-strings": "def f(): return " + "f'{" * 10_000,
    "elifs": "def f():\n if 0: pass\n" + " elif 0: pass\n" * 3_500,
    "indents": "def f():\n" + "".join(" " * n + "if 1:\n" for n in range(1, 300)),
    "huge": "def f():\n    return 1\n" + "#" * 10**7,
    "long number": "def f(): return " + "9" * 10_000,
}


def test_hostile_texts_are_syntax_errors() -> None:
    judgements = judge(list(HOSTILE.values()), [1.0] * len(HOSTILE))
    wrong = {name: j.reason for name, j in zip(HOSTILE, judgements, strict=True) if j.reason != "syntax"}
    assert set(wrong) <= {"elifs", "sums", "attributes"}  # a newer Python may compile these
    assert set(wrong.values()) <= {"error", "blocked", "wrong"}


LINES = ["import a\n", "```\n", "```python\ndef\n", "\n", "def\n", "from x\n\n", "```\n\n```\n"]


def count_steps(text: str) -> int:
    """The lines of code that are executed to locate the program."""
    steps = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal steps
        steps += event == "line"
        return trace if frame.f_code.co_filename == grading.__file__ else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        locate(text)
    finally:
        sys.settrace(before)
    return steps


@pytest.mark.parametrize("line", LINES)
def test_locating_takes_linear_time(line: str) -> None:
    """Twice the lines take twice the steps at most, each of which looks at one line or one block; blocks are apart."""
    assert 0 < count_steps(line * 2000) <= 2 * count_steps(line * 1000)
    blocks = grading._iterate_blocks((line * 1000).split("\n"))
    assert sum(map(len, blocks)) <= len(line) * 1000


def test_a_long_line_is_no_riddle() -> None:
    """A pattern that tries all ways to share out the spaces would take hours here, and days of a longer line."""
    assert locate("```" + " " * 10**6 + "x\ndef f()") == "def f()"
    assert locate("``` Python " + " " * 10**6 + "\ndef f()") == "def f()"


def test_a_long_answer_around_a_program_is_cut_quickly() -> None:
    text = F + "\n" + "and so on, without end.\n" * 1500
    (judgement,) = judge([text], [1.0])
    assert judgement.is_correct
    assert judgement.program == F
