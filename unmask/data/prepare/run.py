"""Runs a preparation, from settings to store."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import chain, islice
from typing import Any, TypeVar

from unmask import files
from unmask.data.chat_template import ChatTemplate
from unmask.data.prepare.conversations import find_template
from unmask.data.prepare.documents import find_sources
from unmask.data.prepare.hub import HubSource, write_rows
from unmask.data.prepare.round_trip import LossyTokenizer
from unmask.data.prepare.settings import PrepareSettings
from unmask.data.prepare.sources import RowSource
from unmask.data.prepare.workers import KINDS, WorkFolder, tokenise
from unmask.data.prepare.writing import NothingLeft, write_store
from unmask.data.vocabulary import Vocabulary
from unmask.errors import RunFailed, UserError
from unmask.progress import console, progress, warn

_NUM_SHOWN = 5

T = TypeVar("T")


def prepare(settings: PrepareSettings) -> dict[str, Any]:
    """Makes the store `settings.out`; returns its `meta.json`.

    Called again after it was stopped or killed, it goes on. Each row is the prompt and the separator
    (`infill.encode_prompts`), then the answer, both without the space around them, then end tokens up to the length. A
    row fits if it has an end token; one that was truncated has none, so that no model learns to end in the middle.
    (Running text: `rows.py`; conversations: `conversations.py`.)

    Raises:
        UserError: something in `settings`, a source or a row cannot be used, or `settings.out` exists.
    """
    if settings.out.exists():
        raise UserError(f"--out {settings.out}: exists already; delete it, or name another folder")
    sources = find_sources(settings.sources, settings.row)
    vocabulary = Vocabulary.from_source(settings.tokenizer, settings.eos_token, settings.mask_token)
    if settings.row.kind == "chat":
        settings = replace(settings, template=find_template(settings, vocabulary))
    fingerprints = [source.fingerprint() for source in sources]
    identity = settings.identity() | {"sources": fingerprints, "tokenizer": vocabulary.fingerprint}
    try:
        with WorkFolder(settings.partial, identity) as work:
            num_shards = _make_shards(sources, vocabulary, settings, work)
            extra = {"dataset": settings.dataset, "vocab": settings.vocab, "too_long": settings.too_long}
            meta = write_store(
                work.store,
                [work.shard(number) for number in range(num_shards)],
                vocabulary,
                settings,
                extra | settings.layout | {"sources": fingerprints},
                KINDS[settings.row.kind].finish_rows,
            )
            if isinstance(settings.template, ChatTemplate):
                settings.template.save(work.store)
            _write_test(sources, settings, work)
            _publish(work, settings)
    except (LossyTokenizer, NothingLeft):
        shutil.rmtree(settings.partial, ignore_errors=True)  # of no use for any other tokenizer, settings or rows
        raise
    except OSError as error:
        failed = UserError if error.errno in files.WRONG_PATH else RunFailed
        raise failed(
            f"{settings.partial}: cannot be written: {error}; mend that, and the same command goes on"
        ) from error
    return meta


def _make_shards(sources: list[RowSource], vocabulary: Vocabulary, settings: PrepareSettings, work: WorkFolder) -> int:
    """Makes the shards; returns how many there are."""
    rows = islice(chain.from_iterable(source.rows(settings.fields) for source in sources), settings.limit)
    num_shards = num_read = num_bad = 0
    with (
        progress("Preparing rows", _count_rows(sources, settings.limit)) as update,
        closing(tokenise(batched(rows, settings.batch_rows), vocabulary, settings, work)) as reports,
    ):
        for report in reports:
            num_shards += 1
            for bad in report.bad:
                num_bad += 1
                _report_bad(bad, num_bad, settings)
            num_read += report.counts["read"]
            update(num_read)
    return num_shards


def _count_rows(sources: list[RowSource], limit: int | None) -> int | None:
    known = [source.num_rows() for source in sources]
    total = None if None in known else sum(number for number in known if number is not None)
    return total if limit is None else min(limit, total or limit)


def batched(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yields lists of `size` rows; the last may be shorter."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def _report_bad(bad: dict[str, str], number: int, settings: PrepareSettings) -> None:
    """Ends the preparation at a bad row, or with `skip_bad` shows it; `number` counts bad rows."""
    message = f"{bad['place']}: {bad['problem']}"
    if not settings.skip_bad:
        raise UserError(
            f"{message}; correct it, or leave out such rows with --skip-bad (of `unmask prepare`; what is done is kept)"
        )
    if number <= _NUM_SHOWN:
        warn(f"left out: {message}")
    elif number == _NUM_SHOWN + 1:
        console.print(f"(further bad rows are listed in {settings.out / 'bad_rows.jsonl'})")


def _write_test(sources: list[RowSource], settings: PrepareSettings, work: WorkFolder) -> None:
    """Writes the rows for evaluation, if the data set has such."""
    dataset = settings.row
    source = sources[0]
    if dataset.test_split is not None and isinstance(source, HubSource):
        write_rows(source.of_split(dataset.test_split), settings.fields, work.store / "test.jsonl")


def _publish(work: WorkFolder, settings: PrepareSettings) -> None:
    files.sync(work.store)
    work.store.rename(settings.out)
    files.sync(settings.out.parent)
    work.delete()
