"""A store of word problems, and the task on it."""

from pathlib import Path

import pytest

from tests.helpers.text import settings
from unmask.data.prepare import prepare
from unmask.tasks.gsm8k import Gsm8k, Gsm8kData


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 rows of 128 tokens, whose programs return their number."""
    folder = tmp_path_factory.mktemp("store")
    prepare(settings(folder))
    return folder / "out"


@pytest.fixture
def task(store: Path) -> Gsm8k:
    return Gsm8k(Gsm8kData(path=str(store)))
