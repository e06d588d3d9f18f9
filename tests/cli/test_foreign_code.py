"""Code of the user's own that fails: exit code 2, and a message that begins with its own line, whatever it does."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import SHORT, run_cli

FROM = "from unmask.masking.uniform import RandomMasking\nfrom unmask.config.settings import Section\n"
TASK = "from unmask.tasks.toy import Toy\n\n"
MODEL = "from unmask.models.transformer import Transformer\n\n"
TIME = "from unmask.masking.time import FormulaConfig\n\n"
NETWORK = (
    "from torch import nn\nfrom unmask.config.settings import Section\n\nclass Mine(nn.Module):\n"
    "    class Config(Section):\n        name: str\n    @classmethod\n    def from_config(cls, config, tokens):\n"
    "        return cls()\n"
)
BROKEN = {
    "syntax": (
        "process",
        "def f(:\n",
        ["1: SyntaxError: invalid syntax", "process.name=theirs:Mine: cannot import it"],
    ),
    "raise": ("process", "\nraise RuntimeError('not today')\n", ["2: RuntimeError: not today", "cannot import it"]),
    "exit": ("process", "import sys\nsys.exit(0)\n", ["2: sys.exit(0)", "cannot import it"]),
    "an import of its own": ("task", "import nothing_there\n", ["1: ModuleNotFoundError: No module named"]),
    "deep inside": ("model", "def f():\n    return 1 / 0\n\nf()\n", ["2: ZeroDivisionError: division by zero"]),
    "no class": ("model", "", ["model.name=theirs:Mine: cannot import it", "no attribute 'Mine'"]),
    "exit when built": (
        "process",
        FROM + "class Mine(RandomMasking):\n    def __init__(self, *a, **k):\n        raise SystemExit(0)\n",
        ["5: sys.exit(0)", "process.name=theirs:Mine: cannot build it"],
    ),
    "raise when built": (
        "task",
        TASK + "class Mine(Toy):\n    @classmethod\n    def from_config(cls, config):\n        return config.nothing\n",
        ["6: AttributeError", "task.name=theirs:Mine: cannot build it"],
    ),
    "weights": (
        "model",
        MODEL + "class Mine(Transformer):\n    def init_weights(self, seed):\n        exit(3)\n",
        ["5: sys.exit(3)", "cannot draw its weights"],
    ),
    "a class for Config": (
        "process",
        "class Mine:\n    from_config = print\n    class Config:\n        pass\n",
        ["its Config is no subclass of unmask.config.settings.Section"],
    ),
    "a string for Config": ("task", "class Mine:\n    from_config = Config = 'x'\n", ["its Config is no subclass"]),
    "a validator that breaks": (
        "process",
        FROM + "from pydantic import model_validator\nclass Mine(RandomMasking):\n    class Config(Section):\n"
        "        name: str\n        @model_validator(mode='before')\n        @classmethod\n"
        "        def check(cls, given):\n            return given['nothing']\n",
        ["10: KeyError: 'nothing'", "cannot check its settings"],
    ),
    "no methods of a process": (
        "process",
        FROM + "class Mine:\n    class Config(Section):\n        name: str\n    @classmethod\n"
        "    def from_config(cls, config, context):\n        return cls()\n",
        ["process.name=theirs:Mine: is not a process: it has no examples_seen and no load_state_dict and no metrics"],
    ),
    "no head": ("model", NETWORK + "    def forward(self, xt, at): ...\n", ["is not a model: it has no head_weight"]),
    "no forward": ("model", NETWORK + "    head_weight = 1\n", ["it is no nn.Module with a method forward"]),
    "a density": (
        "time",
        TIME + "class Mine(FormulaConfig):\n    name: str = 'theirs:Mine'\n    def log_shape(self, t):\n"
        "        return t.nothing\n",
        ["6: AttributeError", "time.name=theirs:Mine: cannot make it"],
    ),
    "no density": ("time", "class Mine:\n    model_fields = density = 1\n", ["it is no subclass of"]),
}
KEYS = {"time": ["process.name=uniform", "process.time.name=theirs:Mine"], "task": ["task.name=theirs:Mine", "data={}"]}
KEYS["model"] = ["model={name: 'theirs:Mine', dim: 8, ff_dim: 8, num_layers: 1, num_heads: 1}"]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module of the current folder that is not there yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    yield tmp_path / "theirs.py"
    sys.modules.pop("theirs", None)


@pytest.mark.parametrize(("kind", "code", "parts"), BROKEN.values(), ids=BROKEN.keys())
def test_code_that_fails_is_named(
    kind: str, code: str, parts: list[str], module: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module.write_text(code)
    keys = KEYS.get(kind, [f"{kind}.name=theirs:Mine"])
    if "class Mine(nn.Module)" in code:
        keys = ["model={name: 'theirs:Mine'}"]
    assert run_cli("train", "debug", *SHORT, *keys, "--out", "run") == 2
    message = capsys.readouterr().err
    if parts[0][0].isdigit():
        assert f"Error: {module}:" in message.replace("\n", ""), message
    for part in parts:
        assert part in " ".join(message.split()), message
    assert "Traceback" not in message
    assert not Path("run").exists()


def test_a_step_that_exits_is_no_success(module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module.write_text(FROM + "class Mine(RandomMasking):\n    def observe(self, batch, stats):\n        exit(0)\n")
    assert run_cli("train", "debug", *SHORT, "process.name=theirs:Mine", "--out", "run") == 1
    assert "a step called sys.exit(0)" in capsys.readouterr().err
    assert run_cli("bench", "step", "debug", *SHORT, "process.name=theirs:Mine", "--count", "1") == 1
    assert "theirs.py:5: sys.exit(0): the command did not finish" in capsys.readouterr().err.replace("\n", "")


def test_an_interrupt_stays_one(module: Path) -> None:
    module.write_text("raise KeyboardInterrupt\n")
    assert run_cli("train", "debug", *SHORT, "process.name=theirs:Mine", "--out", "run") == 130


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "observe(self, batch, stats):\n        1 / 0\n",
            "theirs.py:5: ZeroDivisionError: division by zero; --traceback",
        ),
        ("metrics(self):\n        raise StopIteration\n", "theirs.py:5: StopIteration; --traceback"),
        ("state_dict(self):\n        raise ValueError('no state')\n", "theirs.py:5: ValueError: no state; --traceback"),
        ("observe(self, batch, stats):\n        raise BrokenPipeError\n", "Error: BrokenPipeError. The run stops"),
    ],
    ids=["a step", "its numbers", "its state", "an error without words"],
)
def test_code_that_fails_in_a_run_is_named(
    body: str, said: str, module: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module.write_text(f"{FROM}class Mine(RandomMasking):\n    def {body}")
    assert run_cli("train", "debug", *SHORT, "process.name=theirs:Mine", "--out", "run") == 1
    message = capsys.readouterr().err.replace("\n", "")
    assert said.replace(" ", "") in message.replace(" ", "")
    assert "internal error" not in message
