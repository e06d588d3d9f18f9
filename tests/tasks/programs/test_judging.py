"""What is right, what is wrong, and why."""

import math

import pytest

from unmask.tasks.programs import sandbox
from unmask.tasks.programs.grading import Judgement, judge
from unmask.tasks.programs.inside.jail import SandboxLimits
from unmask.tasks.programs.sandbox import run_programs
from unmask.tasks.programs.worker import Worker

RIGHT = {
    "int": "def f():\n    return 18",
    "float": "def f():\n    return 36 / 2",
    "string": 'def f():\n    return "$18.00"',
    "any name": "def how_many_apples():\n    return 18",
    "the last one": "def f():\n    return 17\n\ndef g():\n    return 18",
    "the last without arguments": "def f():\n    return 18\n\ndef g(x):\n    return x",
    "defaults": "def f(a=9, *rest, b=2, **more):\n    return a * b",
    "helpers": "def half(x):\n    return x / 2\n\ndef f():\n    return half(36)",
    "recursion": "def f(n=5):\n    return 3 if n == 0 else f(n - 1) + 3",
    "import": "import math\nfrom math import ceil, pi as p\n\ndef f():\n    return ceil(p * 5.5) + math.floor(0.5)",
    "import inside": "def f():\n    import math as m\n    from functools import reduce\n    return m.comb(18, 1)",
    "star": "from math import *\n\ndef f():\n    return sqrt(324)",
    "fractions": "from fractions import Fraction\n\ndef f():\n    return float(Fraction(36, 2))",
    "decimal": "from decimal import Decimal\n\ndef f():\n    return int(Decimal('17.5').quantize(Decimal('1')))",
    "statistics": "import statistics\n\ndef f():\n    return statistics.mean([17, 19])",
    "collections": "from collections import Counter, defaultdict\n\ndef f():\n    return Counter('a' * 18)['a']",
    "dates": "from datetime import date, timedelta\n\ndef f():\n    return (date(2024, 3, 8) - date(2024, 2, 19)).days",
    "typing": "from typing import List\n\ndef f(x: List[int] = [9, 9]) -> float:\n    return sum(x)",
    "printing": "def f():\n    print('{:.2f}'.replace('2', 'x'), f'{18:>4}', '{:.1f}'.format(1.5))\n    return 18",
    "main": "def f():\n    return 18\n\nif __name__ == '__main__':\n    print(f())\n    undefined()",
    "comprehension": "def f():\n    return sum(_ for _ in range(7) if _ > 2)",
    "a builtin's name": "def f():\n    input = 9\n    type, id = 2, 0\n    return input * type + id",
    "beyond ASCII": "def f():\n    cachaça = 18\n    return cachaça",
    "cut": "def f():\n    return 18\n\nThe answer is 18.",
    "match": "def f():\n    match [1, 18]:\n        case [_, x]:\n            return x",
    "generator": "def f():\n    return next(x for x in range(99) if x == 18)",
    "except": "def f():\n    try:\n        return 1 / 0\n    except ZeroDivisionError as e:\n        return 18",
    "while": "def f():\n    n = 0\n    while n < 18:\n        n += 1\n    return n",
}

NOT_RIGHT = {
    "another number": ("def f():\n    return 17", "wrong", ""),
    "prose": ("It is 18.", "no_program", "no program"),
    "arguments": ("def f(x):\n    return 18", "no_program", "without arguments"),
    "async": ("async def f():\n    return 18", "no_program", ""),
    "syntax": ("def f(:\n    return 18", "syntax", "SyntaxError: "),
    "return outside": ("def f(x):\n    return 18\nreturn 18", "syntax", ""),
    "division": ("def f():\n    return 1 / 0", "error", "ZeroDivisionError: division by zero"),
    "name": ("def f():\n    return apples", "error", "NameError: name 'apples'"),
    "None": ("def f():\n    pass", "error", "returned a NoneType"),
    "bool": ("def f():\n    return True", "error", "returned a bool"),
    "tuple": ("def f():\n    return 18, 18", "error", "returned a tuple"),
    "nan": ("def f():\n    return float('nan')", "error", "the result is nan"),
    "infinity": ("def f():\n    return float('inf')", "error", "the result is inf"),
    "words": ("def f():\n    return 'eighteen'", "error", "'eighteen' is not a number"),
    "two numbers": ("def f():\n    return '1, 8'", "error", "'1, 8' is not a number"),
    "digits apart": ("def f():\n    return '1 8'", "error", "'1 8' is not a number"),
    "no thousands": ("def f():\n    return '1,8'", "error", "'1,8' is not a number"),
    "generator": ("def f():\n    yield 18", "error", "returned a generator"),
    "numpy": ("import numpy as np\n\ndef f():\n    return 18", "blocked", "import of numpy"),
    "a class": ("def f():\n    class A: pass\n    return 18", "blocked", "ClassDef"),
}


@pytest.fixture(scope="module")
def judgements() -> dict[str, Judgement]:
    texts = {**RIGHT, **{f"not {name}": text for name, (text, _, _) in NOT_RIGHT.items()}}
    return dict(zip(texts, judge(list(texts.values()), [18.0] * len(texts)), strict=True))


@pytest.mark.parametrize("name", RIGHT)
def test_right(name: str, judgements: dict[str, Judgement]) -> None:
    judgement = judgements[name]
    assert (judgement.reason, judgement.is_correct, judgement.value) == ("correct", True, 18.0), judgement


@pytest.mark.parametrize("name", NOT_RIGHT)
def test_not_right(name: str, judgements: dict[str, Judgement]) -> None:
    judgement = judgements[f"not {name}"]
    _, reason, explanation = NOT_RIGHT[name]
    assert (judgement.reason, judgement.is_correct) == (reason, False)
    assert explanation in judgement.output


def test_what_was_printed_is_kept_and_bounded(judgements: dict[str, Judgement]) -> None:
    assert judgements["printing"].output.endswith("  18 1.5\n")
    (outcome,) = run_programs(["def f():\n    print('x' * 100000)\n    return 1"])
    assert (outcome.value, len(outcome.output)) == (1.0, 500)


def test_unknown_answers_and_repeats() -> None:
    """The same program runs once; every text counts towards what is done, and to be done."""
    done: list[int] = []
    texts = ["def f():\n    return 2", "none", "def f():\n    return 2\nWell.", "def f():\n    return 2"]
    judgements = judge(texts, [2.0, 2.0, None, 3.0], update=done.append)
    assert [j.reason for j in judgements] == ["correct", "no_program", "wrong", "wrong"]
    assert [j.value for j in judgements] == [2.0, None, 2.0, 2.0]
    assert done == sorted(done)
    assert done[-1] == 4
    assert judge([], []) == []


def test_many_honest_programs_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program takes a fork. An interpreter for each of them would take ten times as long."""
    started: list[Worker] = []

    class Counted(Worker):
        def __init__(self, limits: SandboxLimits) -> None:
            super().__init__(limits)
            started.append(self)

    monkeypatch.setattr(sandbox, "Worker", Counted)
    programs = [f"def f():\n    return {n} * {n} / 4" for n in range(200)]
    outcomes = run_programs(programs, workers=3)
    assert [outcome.value for outcome in outcomes] == [n * n / 4 for n in range(200)]
    assert len(started) <= 3


def test_a_program_has_one_result() -> None:
    """Also where it depends on the order of a set: strings are hashed alike in every run."""
    program = "def f():\n    return ''.join({'1', '2', '3', '4', '5', '6', '7', '8', '9'})"
    assert len({run_programs([program])[0].value for _ in range(3)}) == 1


def test_huge_ints_are_rounded_or_refused() -> None:
    big, too_big, digits = run_programs([f"def f():\n    return {text}" for text in ("2**100", "2**1024", "'9' * 400")])
    assert big.value == 2.0**100
    assert (too_big.reason, too_big.output) == ("error", "a result of 1025 bits")
    assert (digits.reason, math.isfinite(big.value)) == ("error", True)
