"""A finished run for all tests of the command line."""

from pathlib import Path

import pytest

from tests.helpers import SHORT, run_cli


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished debug run."""
    out = tmp_path_factory.mktemp("runs") / "debug"
    assert run_cli("train", "debug", *SHORT, "eval.tokens_per_step=[1, 3]", "--out", out) == 0
    return out
