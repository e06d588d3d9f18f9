"""Trackers that are sent a run's numbers. A run neither waits for one nor fails with it: metrics.jsonl has all.

Each works in a thread of its own, from a queue; what its package raises is told once, and the tracker is left alone.
"""

import importlib
import importlib.util
import os
import queue
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from unmask import files
from unmask.errors import UserError
from unmask.progress import warn

_QUEUE_LENGTH = 10_000
_PATIENCE = 30.0  # seconds that the end of a run waits for a tracker


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run at its start."""

    project: str
    name: str
    id: str
    """The same after a resume."""
    folder: Path
    config: dict[str, Any]


@runtime_checkable
class _Client(Protocol):
    def log(self, values: dict[str, float], /, *, step: int) -> object: ...

    def finish(self) -> object: ...


def _wandb(wandb: ModuleType, about: About) -> _Client:
    """Offline without a key (`wandb sync` sends it later), unless WANDB_MODE says otherwise."""
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


def _trackio(trackio: ModuleType, about: About) -> _Client:
    """To a Space only where TRACKIO_SPACE_ID says so. It knows a run by its name."""
    name = f"{about.name}-{about.id}"
    return trackio.init(project=about.project, name=name, config=about.config, resume="allow")


TRACKERS: dict[str, Callable[[ModuleType, About], _Client]] = {"wandb": _wandb, "trackio": _trackio}
"""By the name of the package, which is also that of the extra; each starts a run."""


def check(names: Sequence[str]) -> None:
    """Before any work is done.

    Raises:
        UserError: a package is not there.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name, such as wandb's own, is no package
            raise UserError(f"log.to={name}: the package is not installed; pip install 'unmask[{name}]', or log.to=[]")


def identity(folder: Path) -> str:
    """What trackers know the run in `folder` by: made once, and kept there."""
    path = folder / "tracker_id"
    if not path.exists():
        files.write(path, uuid.uuid4().hex[:8])
    return path.read_text()


class Tracker:
    """One of `TRACKERS`, with a thread and a queue between it and the run."""

    def __init__(self, name: str, about: About, *, patience: float = _PATIENCE) -> None:
        self._name, self._patience = name, patience
        self._is_lost = False
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(_QUEUE_LENGTH)
        self._thread = threading.Thread(target=self._work, args=(about,), daemon=True)
        self._thread.start()

    def write(self, step: int, values: dict[str, float]) -> None:
        self._put((step, values))

    def close(self) -> None:
        """Waits until all is sent, but not for ever."""
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

    def _work(self, about: About) -> None:
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
    except (OSError, UnicodeDecodeError):
        return ""
