"""Fixtures shared by all tests. No test needs the network, a GPU or data outside the checkout unless it says so."""

import os
import signal
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.helpers import RandomStream

# A busy machine is slow, and many workers make it busy.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

DATA = os.environ.get("UNMASK_TEST_DATA")


NUM_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
NUM_THREADS = max(1, min(2, (os.cpu_count() or 1) // NUM_WORKERS))
"""Of each worker and of the processes it starts; the golden losses hold for one thread and for two."""


LONG_FILES = ("training/test_compiled.py", "distributed/test_training.py", "distributed/test_runs.py")
"""Files of few tests and many seconds. They start first, so that no worker ends with one while the others are idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not str(item.path).endswith(LONG_FILES))  # stable


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    # Training sets the number for its process, and more threads than cores wait for each other.
    torch.set_num_threads(NUM_THREADS)


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["OMP_NUM_THREADS"] = str(NUM_THREADS)
    shared = tmp_path_factory.getbasetemp().parent if NUM_WORKERS > 1 else tmp_path_factory.getbasetemp()
    os.environ["UNMASK_CACHE"] = str(shared / "cache")  # one for all workers: they lock what they make
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # so a shell starts what it runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # some tests send it


@pytest.fixture
def sudoku_data() -> Path:
    """A folder of public Sudoku files (see CONTRIBUTING.md)."""
    return _data("sudoku")


@pytest.fixture
def gsm8k() -> Path:
    """The files of GSM8K (see CONTRIBUTING.md)."""
    return _data("gsm8k")


@pytest.fixture
def tiny_llama() -> Path:
    """A trained Llama of 230 976 parameters (see CONTRIBUTING.md)."""
    return _data("checkpoints/aidreams260K")


def _data(folder: str) -> Path:
    if DATA is None or not (Path(DATA) / folder).exists():
        pytest.skip(f"UNMASK_TEST_DATA={DATA} holds no folder {folder}")
    return Path(DATA) / folder


@pytest.fixture(scope="session")
def qwen() -> Path:
    """Qwen 2's tokenizer (see CONTRIBUTING.md)."""
    if DATA is None or not (Path(DATA) / "tokenizers" / "qwen").exists():
        pytest.skip(f"UNMASK_TEST_DATA={DATA} holds no folder tokenizers/qwen")
    return Path(DATA) / "tokenizers" / "qwen"


@pytest.fixture
def stream() -> RandomStream:
    return RandomStream(length=12, vocab_size=7)
