"""Experiment trackers (wandb, trackio). A run neither waits for one nor fails with it: metrics.jsonl has all numbers.

Each works in its own thread, from a queue; an error of its package is a warning, and ends the tracker.
"""

import importlib
import importlib.util
import os
import queue
import re
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from unmask import files, formats
from unmask.errors import UserError
from unmask.progress import warn

_QUEUE_LENGTH = 10_000
_MAX_ID = 1000  # bytes
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")  # one of older runs may be of one's own
_PATIENCE = 30.0  # seconds that the end of a run waits for a tracker


@dataclass(frozen=True)
class RunInfo:
    """Name, folder and configuration of a run, for a tracker."""

    project: str
    name: str
    id: str
    """Identity of the run; a resumed run keeps it."""
    folder: Path
    config: dict[str, Any]


@runtime_checkable
class _Client(Protocol):
    def log(self, values: dict[str, float], /, *, step: int) -> object: ...

    def finish(self) -> object: ...


def _wandb(wandb: ModuleType, about: RunInfo) -> _Client:
    """Starts a run in wandb: offline without a key (`wandb sync` sends it later), unless WANDB_MODE is set."""
    has_key = "WANDB_API_KEY" in os.environ or "wandb" in _netrc()
    return wandb.init(
        project=about.project,
        name=about.name,
        id=about.id,
        dir=str(about.folder),
        config=about.config,
        resume="allow",
        mode=os.environ.get("WANDB_MODE", "online" if has_key else "offline"),
        settings=wandb.Settings(console="off"),
    )


def _trackio(trackio: ModuleType, about: RunInfo) -> _Client:
    """Starts a run in trackio, which knows runs by name; TRACKIO_SPACE_ID sends it to a Space."""
    name = f"{about.name}-{about.id}"
    return trackio.init(project=about.project, name=name, config=about.config, resume="allow")


TRACKERS: dict[str, Callable[[ModuleType, RunInfo], _Client]] = {"wandb": _wandb, "trackio": _trackio}
"""Functions that start a run, by the name of the package, which is also that of the extra."""


def check(names: Sequence[str]) -> None:
    """Checks that the packages are installed, before any work is done.

    Raises:
        UserError: one is not.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name, such as wandb's own, is no package
            raise UserError(f"log.to={name}: the package is not installed; pip install 'unmask[{name}]', or log.to=[]")


def tracker_id(folder: Path) -> str:
    """Returns the id of the run in `folder` for trackers; makes it once and keeps it there.

    Raises:
        UserError: what is there is no id.
    """
    path = folder / "tracker_id"
    if not path.exists():
        files.write(path, uuid.uuid4().hex[:8])
    found = formats.read_text(path, max_bytes=_MAX_ID).strip()
    if not _ID.fullmatch(found):
        raise UserError(f"{path}: {found[:40]!r} is no id of a run; delete the file to get another")
    return found


class Tracker:
    """A client of one of `TRACKERS`, with a thread and a queue between it and the run."""

    def __init__(self, name: str, about: RunInfo, *, patience: float = _PATIENCE) -> None:
        self._name, self._patience = name, patience
        self._is_lost = False
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(_QUEUE_LENGTH)
        self._thread = threading.Thread(target=self._work, args=(about,), daemon=True)
        self._thread.start()

    def write(self, step: int, values: dict[str, float]) -> None:
        self._put((step, values))

    def close(self) -> None:
        """Waits until all is sent, for `patience` seconds at most."""
        self._put(None)
        if not self._is_lost:
            self._thread.join(self._patience)
            if self._thread.is_alive():
                self._lose(f"not all was sent within {self._patience:g} seconds")

    def _put(self, item: tuple[int, dict[str, float]] | None) -> None:
        if self._is_lost:
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._lose(f"{self._queue.maxsize} lines wait to be sent")

    def _work(self, about: RunInfo) -> None:
        try:
            client = TRACKERS[self._name](importlib.import_module(self._name), about)
            for step, values in iter(self._queue.get, None):
                client.log(values, step=step)
            client.finish()
        except Exception as error:
            self._lose(str(error) or type(error).__name__)

    def _lose(self, reason: str) -> None:
        if not self._is_lost:
            warn(f"{self._name}: {reason}; the run goes on without it, and metrics.jsonl has all numbers")
        self._is_lost = True


def _netrc() -> str:
    try:
        return Path(os.environ.get("NETRC", "~/.netrc")).expanduser().read_text()
    except (OSError, RuntimeError, UnicodeDecodeError):  # RuntimeError: there is no home folder
        return ""
