"""Text to prepare: files, folders, data sets on the Hugging Face hub, and what every Python brings."""

import hashlib
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unmask.data.prepare.datasets import DATASETS, Dataset
from unmask.data.prepare.hub import Hub
from unmask.data.prepare.sources import ENDINGS, File, Row, Source
from unmask.errors import UserError

_ON_THE_HUB = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")
_NOT_OF_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Files:
    """Files of one folder, in the order of their names."""

    def __init__(self, folder: Path, paths: Sequence[Path]) -> None:
        self._folder, self._paths = folder, sorted(paths)

    def fingerprint(self) -> dict[str, Any]:
        """Folder, number of files, SHA-256 of their names and contents."""
        checksum = hashlib.sha256()
        for path in self._paths:
            name = path.relative_to(self._folder).as_posix()
            checksum.update(f"{name} {File(str(path)).fingerprint()['sha256']}\n".encode())
        return {"path": str(self._folder), "files": len(self._paths), "sha256": checksum.hexdigest()}

    def num_rows(self) -> int | None:
        return None

    def rows(self, fields: tuple[str, ...]) -> Iterator[Row]:
        for path in self._paths:
            yield from File(str(path)).rows(fields)


def find_sources(names: Sequence[str], dataset: Dataset) -> list[Source]:
    """Those that `names` stand for; without any, the whole of `dataset`.

    Raises:
        UserError: there is no such file, or none in a folder.
    """
    if names:
        return [find_source(name) for name in names]
    return [standard_library() if dataset.repository is None else Hub(dataset, dataset.split)]


def find_source(name: str) -> Source:
    """A file, a folder of files, or `OWNER/NAME`, perhaps `OWNER/NAME:CONFIG`, on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(path)
    on_the_hub = _ON_THE_HUB.fullmatch(name)
    if path.exists() or name.endswith(ENDINGS) or on_the_hub is None:
        return File(name)
    return Hub(replace(DATASETS["text"], repository=on_the_hub["repository"], config=on_the_hub["config"]), "train")


def _folder(folder: Path) -> Files:
    paths = [path for path in folder.rglob("*") if path.name.endswith(ENDINGS) and path.is_file()]
    shown = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not shown:
        raise UserError(f"{folder}: holds no file of text; its names would end with {', '.join(ENDINGS)}")
    return Files(folder, shown)


def standard_library() -> Files:
    """The sources of the Python that runs, without its tests: a corpus that is there, of some 10 MB."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in folder.rglob("*.py") if not _NOT_OF_THE_LIBRARY & set(path.relative_to(folder).parts)]
    if not paths:
        raise UserError(
            f"{folder}: this Python brings no sources of its library; give text of your own, data.path=FILE"
        )
    return Files(folder, paths)
