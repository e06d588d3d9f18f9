"""The compiled training step: the same results, compiled once, and never without saying so."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unmask.models import precision

CPU = torch.device("cpu")


def test_compiled_cases() -> None:
    """Those of the head and those of training, in one process: importing and warming up the compiler takes longest."""
    cases = [str(Path(__file__).parents[1] / folder / "compiled_cases.py") for folder in ("models", "training")]
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--show-capture=no", *cases]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    if "skipped" in done.stdout:
        pytest.skip("no compiler")


def test_without_a_compiler_training_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\nand many more lines")

    monkeypatch.setattr(torch, "compile", broken)
    assert not precision.should_compile("auto", CPU)
    said = capsys.readouterr().err
    assert "no C++ compiler" in said
    assert "more lines" not in said
    assert len(said.splitlines()) == 1
    assert precision.should_compile(True, CPU)
    assert not precision.should_compile(False, CPU)
