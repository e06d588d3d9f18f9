"""Batches to shards, in several processes and yet in order."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from unmask.data.prepare import shards
from unmask.data.prepare.kinds import KINDS
from unmask.data.prepare.settings import Settings
from unmask.data.prepare.shards import Report
from unmask.data.prepare.sources import Row
from unmask.data.prepare.work import Work
from unmask.data.vocabulary import Vocabulary
from unmask.errors import UserError

T = TypeVar("T")


@dataclass
class _Worker:
    """What a process needs to make shards."""

    vocabulary: Vocabulary
    settings: Settings


_worker: _Worker | None = None


def tokenise(
    batches: Iterable[list[Row]], vocabulary: Vocabulary, settings: Settings, work: Work
) -> Generator[Report, None, None]:
    """Makes the shards that `work` lacks; yields the report of each, in order, of those that it has as well."""
    global _worker
    _worker = _Worker(vocabulary, settings)
    with _executor(vocabulary, settings, work) as executor:
        waiting: deque[Callable[[], Report]] = deque()
        for number, rows in enumerate(batches):
            waiting.append(_submit(executor, rows, work.shard(number)))
            if len(waiting) > 2 * settings.workers:
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()


def _submit(executor: Executor, rows: list[Row], path: Path) -> Callable[[], Report]:
    if path.exists():
        return lambda: shards.load_report(path)
    return executor.submit(_make, rows, path).result


def _make(rows: list[Row], path: Path) -> Report:
    assert _worker is not None
    make_shard = KINDS[_worker.settings.row.kind].make_shard
    shard = make_shard(rows, _worker.vocabulary, _worker.settings)
    shards.save(path, shard)
    return shard.report


class _Here(Executor):
    """This process, at once."""

    def submit(self, function: Callable[..., T], /, *arguments: Any, **options: Any) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(function(*arguments, **options))
        return future


@contextmanager
def _executor(vocabulary: Vocabulary, settings: Settings, work: Work) -> Iterator[Executor]:
    if settings.workers == 1:
        yield _Here()
        return
    vocabulary.save(work.folder)
    eos, mask = vocabulary.original([vocabulary.eos_id, vocabulary.mask_id])
    assert eos is not None
    context = get_context("forkserver")  # a fork of this process would inherit torch's and the tokenizer's threads
    context.set_forkserver_preload([__name__])
    start = partial(_start, work.folder / "tokenizer.json", eos, mask, settings)
    pool = ProcessPoolExecutor(settings.workers, context, start)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError(
            f"--workers {settings.workers}: a process was killed, perhaps for want of memory; the same command goes on "
            "where this stopped, with fewer --workers too"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(tokenizer: Path, eos: int, mask: int | None, settings: Settings) -> None:
    """In a new process: Ctrl-C is for the parent to handle, and nobody outlives it."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    _worker = _Worker(Vocabulary(Tokenizer.from_file(str(tokenizer)), eos, mask), settings)


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
