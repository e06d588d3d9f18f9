"""A model to score text with, for all tests of evaluation."""

from pathlib import Path

import pytest
import torch

from tests.evaluation.judges import random_llama
from unmask.evaluation.judge import Scorer


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama with a byte-level tokenizer."""
    return random_llama(tmp_path_factory.mktemp("judge") / "llama")


@pytest.fixture(scope="session")
def scorer(judge: Path) -> Scorer:
    return Scorer.load(str(judge), torch.device("cpu"))
