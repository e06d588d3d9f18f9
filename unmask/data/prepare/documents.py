"""Reads text: finds its sources, reads the texts of rows, and tokenises running text as a shard of documents.

Sources are files, folders, data sets on the Hugging Face hub, and the sources of Python's standard library.
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

from unmask.data.prepare.hub import HubSource
from unmask.data.prepare.round_trip import check_round_trip, choose_rows
from unmask.data.prepare.settings import DATASETS, Dataset, PrepareSettings
from unmask.data.prepare.sources import ENDINGS, FileSource, Row, RowSource
from unmask.data.prepare.writing import Report, Shard
from unmask.data.vocabulary import Vocabulary
from unmask.errors import UserError
from unmask.paths import user_path


class _BadRow(Exception):
    """The error of a row that cannot be used."""


def read_texts(rows: Sequence[Row], fields: tuple[str, ...]) -> tuple[dict[int, tuple[str, ...]], dict[int, str]]:
    """Reads the texts of `fields` in rows that have them, and the problems of the others; both by place in `rows`."""
    texts, problems = {}, {}
    for i, row in enumerate(rows):
        try:
            texts[i] = _read_row(row, fields)
        except _BadRow as problem:
            problems[i] = str(problem)
    return texts, problems


def _read_row(row: Row, fields: tuple[str, ...]) -> tuple[str, ...]:
    try:
        content = row.fields
    except ValueError as error:
        raise _BadRow(str(error)) from error
    return tuple(_read_text(content, field) for field in fields)


def _read_text(content: dict[str, Any], field: str) -> str:
    if field not in content:
        raise _BadRow(
            f"has no field {field!r}, but {', '.join(content) or 'none'} "
            "(name it: --prompt-field, --answer-field; of text, --text-field or data.field)"
        )
    value = content[field]
    if not isinstance(value, str):
        raise _BadRow(f"field {field!r} is {str(value)[:40]}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _BadRow(f"field {field!r} is no text: {error}") from error
    return value


def find_special_token(ids: Sequence[int], vocabulary: Vocabulary) -> str | None:
    """Describes a mask or end token that stands as text in a row; None if there is none."""
    for name, option, token in (("mask", "--mask-token", vocabulary.mask_id), ("end", "--eos", vocabulary.eos_id)):
        if token in ids:
            return f"holds the {name} token {vocabulary.name(token)!r} (choose another: {option})"
    return None


_AT_ONCE = 32
"""Documents tokenised at a time: more would hold more Python objects, one for each token."""


def make_shard(rows: Sequence[Row], vocabulary: Vocabulary, settings: PrepareSettings, before: int = 0) -> Shard:
    """Tokenises `rows`, which follow `before` others, in the ids of `vocabulary`, with the space around each text."""
    texts, problems = read_texts(rows, settings.fields)
    fates: Counter[str] = Counter()
    kept: list[NDArray[np.uint32]] = []
    keys = []
    places = list(texts)
    chosen = {places[number] for number in choose_rows(len(places), before, settings)}
    for start in range(0, len(places), _AT_ONCE):
        some = places[start : start + _AT_ONCE]
        checked: list[tuple[str, list[int]]] = []
        for i, ids in zip(some, vocabulary.encode_batch([texts[i][0] for i in some]), strict=True):
            if problem := find_special_token(ids, vocabulary):
                problems[i] = problem
                continue
            if i in chosen:
                checked.append((texts[i][0], ids))
            fate = _fate(ids, vocabulary, settings)
            fates[fate] += 1
            if fate in ("kept", "truncated"):
                kept.append(np.array(ids[: None if settings.rows == "wrap" else settings.length - 1], np.uint32))
                # equal texts share a key, whatever the tokenizer: all of them are held out, or none
                seed = str(settings.split_seed).encode()
                digest = hashlib.blake2b(texts[i][0].encode(), digest_size=8, key=seed).digest()
                keys.append(int.from_bytes(digest, "big"))
        check_round_trip(checked, vocabulary, settings.tokenizer, is_exact=False)
    return Shard(
        ids=np.concatenate([np.zeros(0, np.uint32), *kept]),
        num_tokens=np.array([len(ids) for ids in kept], np.int64),
        num_prompt=np.zeros(len(kept), np.int64),
        report=Report.of(rows, fates, problems, len(kept)),
        keys=np.array(keys, np.uint64),
    )


def _fate(ids: Sequence[int], vocabulary: Vocabulary, settings: PrepareSettings) -> str:
    if len(ids) < 2:
        return "dropped_short"
    if all(i == vocabulary.unknown_id for i in ids):
        return "dropped_unknown"
    if settings.rows == "wrap" or len(ids) + 2 <= settings.length:  # an end token before it, and one after it
        return "kept"
    return "truncated" if settings.too_long == "truncate" else "dropped_too_long"


_ON_THE_HUB = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")
_NOT_OF_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class FolderSource:
    """The files of one folder, in the order of their names."""

    def __init__(self, folder: Path, paths: Sequence[Path]) -> None:
        self._folder, self._paths = folder, sorted(paths)

    def fingerprint(self) -> dict[str, Any]:
        """Returns folder, number of files, SHA-256 of their names and contents."""
        checksum = hashlib.sha256()
        for path in self._paths:
            name = path.relative_to(self._folder).as_posix()
            checksum.update(f"{name} {FileSource(str(path)).fingerprint()['sha256']}\n".encode())
        return {"path": str(self._folder), "files": len(self._paths), "sha256": checksum.hexdigest()}

    def num_rows(self) -> int | None:
        return None

    def rows(self, fields: tuple[str, ...]) -> Iterator[Row]:
        for path in self._paths:
            yield from FileSource(str(path)).rows(fields)


def find_sources(names: Sequence[str], dataset: Dataset) -> list[RowSource]:
    """Finds the sources `names` (default: the whole of `dataset`).

    Raises:
        UserError: there is no such file, or none in a folder; or `dataset` is of one's own, and nothing is named.
    """
    if names:
        return [find_source(name) for name in names]
    if dataset.kind == "chat":
        raise UserError("chat: name the conversations: files (.jsonl, .jsonl.gz, .parquet), folders, or OWNER/NAME")
    return [standard_library() if dataset.repository is None else HubSource(dataset, dataset.split)]


def find_source(name: str) -> RowSource:
    """Finds a file, a folder of files, or `OWNER/NAME`, perhaps `OWNER/NAME:CONFIG`, on the hub."""
    path = user_path(name)
    if path.is_dir():
        return _find_files(path)
    on_the_hub = _ON_THE_HUB.fullmatch(name)
    if path.exists() or name.endswith(ENDINGS) or on_the_hub is None:
        return FileSource(name)
    return HubSource(
        replace(DATASETS["text"], repository=on_the_hub["repository"], config=on_the_hub["config"]), "train"
    )


def _find_files(folder: Path) -> FolderSource:
    paths = [path for path in folder.rglob("*") if path.name.endswith(ENDINGS) and path.is_file()]
    shown = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not shown:
        raise UserError(f"{folder}: holds no file of text; its names would end with {', '.join(ENDINGS)}")
    return FolderSource(folder, shown)


def standard_library() -> FolderSource:
    """Finds the sources of the running Python, without its tests: a corpus of some 10 MB that needs no download."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in folder.rglob("*.py") if not _NOT_OF_THE_LIBRARY & set(path.relative_to(folder).parts)]
    if not paths:
        raise UserError(
            f"{folder}: this Python brings no sources of its library; give text of your own, data.path=FILE"
        )
    return FolderSource(folder, paths)
