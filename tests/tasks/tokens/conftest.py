"""A store of rows with prompts."""

from pathlib import Path

import pytest

from tests.helpers.stores import rows_with_prompts, write_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("data") / "store", *rows_with_prompts())
