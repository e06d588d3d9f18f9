"""Rows of data sets on the Hugging Face hub, in order."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from unmask import files
from unmask.data.prepare.settings import Dataset
from unmask.data.prepare.sources import Row
from unmask.errors import UserError, first_line


class HubSource:
    """A split of a data set, of the revision that is the newest when it is first used."""

    def __init__(self, dataset: Dataset, split: str) -> None:
        self._dataset, self._split = dataset, split

    @cached_property
    def _revision(self) -> str:
        with _explain_errors(self._dataset):
            return newest_revision(_name(self._dataset))

    def of_split(self, split: str) -> "HubSource":
        """Returns another split of the same revision."""
        other = HubSource(self._dataset, split)
        other._revision = self._revision
        return other

    def fingerprint(self) -> dict[str, Any]:
        """Returns repository, configuration, split, revision."""
        named = {"hub": self._dataset.repository, "config": self._dataset.config, "split": self._split}
        return named | {"revision": self._revision}

    def num_rows(self) -> int | None:
        return None

    def rows(self, fields: tuple[str, ...]) -> Iterator[Row]:
        name = f"{_name(self._dataset)} ({self._split})"
        with _explain_errors(self._dataset):
            for number, content in enumerate(stream(self._dataset, self._split, self._revision), 1):
                yield Row(name, number, content)


def _name(dataset: Dataset) -> str:
    assert dataset.repository is not None, "a data set that is on the hub"
    return dataset.repository


def newest_revision(repository: str) -> str:
    """Asks the hub for its current commit."""
    import huggingface_hub

    return str(huggingface_hub.HfApi().dataset_info(repository).sha)


def stream(dataset: Dataset, split: str, revision: str) -> Iterable[dict[str, Any]]:
    """Reads the rows, which are downloaded meanwhile."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f"{_name(dataset)}: to read from the hub, pip install 'unmask[data]'") from error
    return load_dataset(_name(dataset), dataset.config, split=split, streaming=True, revision=revision)


def write_rows(source: HubSource, fields: tuple[str, ...], path: Path) -> None:
    """Writes the texts of a small split, a JSON object a line."""
    rows = (row.content for row in source.rows(fields) if isinstance(row.content, dict))
    files.write(path, "".join(json.dumps({field: row[field] for field in fields}) + "\n" for row in rows))


@contextmanager
def _explain_errors(dataset: Dataset) -> Iterator[None]:
    """Turns errors of the hub's libraries into `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # it has dozens of kinds: no network, offline, not logged in, moved, damaged
        raise UserError(
            f"{_name(dataset)}: not to be had from the Hugging Face hub: {first_line(error)}; call again to go on, or "
            "download its files and name them: `unmask prepare DATASET FILE ...`"
        ) from error
