"""Makes shards of batches, in several processes and yet in order, and keeps them in the folder of unfinished work."""

import json
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tokenizers import Tokenizer

from unmask import files
from unmask.data.prepare import conversations, documents, rows, writing
from unmask.data.prepare.settings import PrepareSettings
from unmask.data.prepare.sources import Row
from unmask.data.prepare.writing import Report, Shard
from unmask.data.vocabulary import Vocabulary
from unmask.errors import UserError


class Kind(NamedTuple):
    """A kind of data: functions that make a shard of rows, and finish the rows of shards."""

    make_shard: Callable[[Sequence[Row], Vocabulary, PrepareSettings, int], Shard]
    finish_rows: writing.FinishRows


KINDS = {
    "answers": Kind(rows.make_shard, writing.finish_rows),
    "chat": Kind(conversations.make_shard, writing.finish_rows),
    "text": Kind(documents.make_shard, rows.finish_rows),
}
"""By `Dataset.kind`."""

_MANIFEST = "manifest.json"


class WorkFolder:
    """The folder of an unfinished preparation (usually `OUT.partial`), locked until `close`.

    Raises:
        UserError: another process holds it, it belongs to another preparation, or cannot be written.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.store = folder / "store"
        self._shards = folder / "shards"
        self._shards.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = files.FileLock(folder / "lock", wait=False)
        except BlockingIOError:
            raise UserError(f"{folder}: another process works here; wait for it, or use another --out") from None
        try:
            self._check(json.loads(json.dumps(identity)))
        except UserError:
            self.close()
            raise

    def __enter__(self) -> "WorkFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def shard(self, number: int) -> Path:
        """Returns the path of a shard."""
        return self._shards / f"{number:08d}.npz"

    def close(self) -> None:
        self._lock.close()

    def delete(self) -> None:
        shutil.rmtree(self.folder)

    def _check(self, identity: dict[str, Any]) -> None:
        path = self.folder / _MANIFEST
        if not path.exists():
            files.write(path, json.dumps(identity, indent=1) + "\n")
            return
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            changed = sorted(key for key in held.keys() | identity if held.get(key) != identity.get(key))
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: cannot be read: {error}; delete {self.folder}") from error
        if changed:
            details = ", ".join(f"{key} ({held.get(key)!r}, now {identity.get(key)!r})" for key in changed)
            raise UserError(
                f"{self.folder}: holds an unfinished preparation with other settings: {details}; ask for the same "
                "to go on with it, delete it, or use another --out"
            )


T = TypeVar("T")


@dataclass
class _Worker:
    """The state of a process that makes shards."""

    vocabulary: Vocabulary
    settings: PrepareSettings


_worker: _Worker | None = None


def tokenise(
    batches: Iterable[list[Row]], vocabulary: Vocabulary, settings: PrepareSettings, work: WorkFolder
) -> Generator[Report, None, None]:
    """Makes the shards that `work` lacks; yields the report of each, in order, of those that it has as well."""
    global _worker
    _worker = _Worker(vocabulary, settings)
    with _executor(vocabulary, settings, work) as executor:
        waiting: deque[Callable[[], Report]] = deque()
        for number, rows in enumerate(batches):
            waiting.append(_submit(executor, rows, work.shard(number), number * settings.batch_rows))
            if len(waiting) > 2 * settings.workers:
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()


def _submit(executor: Executor, rows: list[Row], path: Path, before: int) -> Callable[[], Report]:
    if path.exists():
        return lambda: writing.load_report(path)
    return executor.submit(_make, rows, path, before).result


def _make(rows: list[Row], path: Path, before: int) -> Report:
    assert _worker is not None
    make_shard = KINDS[_worker.settings.row.kind].make_shard
    shard = make_shard(rows, _worker.vocabulary, _worker.settings, before)
    writing.save(path, shard)
    return shard.report


class _InlineExecutor(Executor):
    """An executor that runs each call at once, in this process."""

    def submit(self, function: Callable[..., T], /, *arguments: Any, **options: Any) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(function(*arguments, **options))
        return future


@contextmanager
def _executor(vocabulary: Vocabulary, settings: PrepareSettings, work: WorkFolder) -> Iterator[Executor]:
    if settings.workers == 1:
        yield _InlineExecutor()
        return
    vocabulary.save(work.folder)
    eos, mask = vocabulary.original([vocabulary.eos_id, vocabulary.mask_id])
    assert eos is not None
    context = get_context("forkserver")  # a fork of this process would inherit torch's and the tokenizer's threads
    context.set_forkserver_preload([__name__])
    start = partial(_init_worker, work.folder / "tokenizer.json", eos, mask, settings)
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


def _init_worker(tokenizer: Path, eos: int, mask: int | None, settings: PrepareSettings) -> None:
    """Sets up a new process: the parent handles Ctrl-C, and no process outlives it."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()
    _worker = _Worker(Vocabulary(Tokenizer.from_file(str(tokenizer)), eos, mask), settings)


def _exit_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
