"""From the rows of a source to a shard of documents: running text, without prompts.

The texts in the rows of a source, and what is wrong with a row.

Text to prepare: files, folders, data sets on the Hugging Face hub, and what every Python brings.
"""

import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmask.data.prepare.hub import Hub
from unmask.data.prepare.settings import DATASETS, Dataset, Settings
from unmask.data.prepare.sources import ENDINGS, File, Row, Source
from unmask.data.prepare.writing import Report, Shard
from unmask.data.vocabulary import Vocabulary
from unmask.errors import UserError


class _Bad(Exception):
    """Why a row cannot be used."""


def read_texts(rows: Sequence[Row], fields: tuple[str, ...]) -> tuple[dict[int, tuple[str, ...]], dict[int, str]]:
    """By their place in `rows`: the texts of `fields` of those that have them, what is wrong with the others."""
    texts, problems = {}, {}
    for i, row in enumerate(rows):
        try:
            texts[i] = _texts(row, fields)
        except _Bad as problem:
            problems[i] = str(problem)
    return texts, problems


def _texts(row: Row, fields: tuple[str, ...]) -> tuple[str, ...]:
    try:
        content = row.fields
    except ValueError as error:
        raise _Bad(str(error)) from error
    return tuple(_text(content, field) for field in fields)


def _text(content: dict[str, Any], field: str) -> str:
    if field not in content:
        raise _Bad(
            f"has no field {field!r}, but {', '.join(content) or 'none'} "
            "(name it: --prompt-field, --answer-field; of text, --text-field or data.field)"
        )
    value = content[field]
    if not isinstance(value, str):
        raise _Bad(f"field {field!r} is {str(value)[:40]}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Bad(f"field {field!r} is no text: {error}") from error
    return value


def special_token(ids: Sequence[int], vocabulary: Vocabulary) -> str | None:
    """What is wrong with a row in which the mask or the end stands as text."""
    for name, option, token in (("mask", "--mask-token", vocabulary.mask_id), ("end", "--eos", vocabulary.eos_id)):
        if token in ids:
            return f"holds the {name} token {vocabulary.name(token)!r} (choose another: {option})"
    return None


_AT_ONCE = 32
"""Documents of which Python objects are held, token by token."""


def make_shard(rows: Sequence[Row], vocabulary: Vocabulary, settings: Settings) -> Shard:
    """Tokenises `rows`, in the ids of `vocabulary`. Text is taken as it is, with the space around it."""
    texts, problems = read_texts(rows, settings.fields)
    fates: Counter[str] = Counter()
    kept: list[NDArray[np.uint32]] = []
    keys = []
    places = list(texts)
    for start in range(0, len(places), _AT_ONCE):
        some = places[start : start + _AT_ONCE]
        for i, ids in zip(some, vocabulary.encode_batch([texts[i][0] for i in some]), strict=True):
            if problem := special_token(ids, vocabulary):
                problems[i] = problem
                continue
            fate = _fate(ids, vocabulary, settings)
            fates[fate] += 1
            if fate in ("kept", "truncated"):
                kept.append(np.array(ids[: None if settings.rows == "wrap" else settings.length - 1], np.uint32))
                keys.append(_key(texts[i][0], settings.split_seed))
    counts = dict(fates) | {"read": len(rows), "kept": len(kept), "bad": len(problems)}
    return Shard(
        ids=np.concatenate([np.zeros(0, np.uint32), *kept]),
        num_tokens=np.array([len(ids) for ids in kept], np.int64),
        num_prompt=np.zeros(len(kept), np.int64),
        report=Report(counts, [{"place": rows[i].place, "problem": problems[i]} for i in sorted(problems)]),
        keys=np.array(keys, np.uint64),
    )


def _fate(ids: Sequence[int], vocabulary: Vocabulary, settings: Settings) -> str:
    if len(ids) < 2:
        return "dropped_short"
    if all(i == vocabulary.unknown_id for i in ids):
        return "dropped_unknown"
    if settings.rows == "wrap" or len(ids) + 2 <= settings.length:  # an end token before it, and one after it
        return "kept"
    return "truncated" if settings.too_long == "truncate" else "dropped_too_long"


def _key(text: str, seed: int) -> int:
    """The hash by which a document is held out or not, whatever the tokenizer; equal texts share it."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest(), "big")


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
