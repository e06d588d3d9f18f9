"""The folder of an unfinished preparation: its shards, and what it was asked to do."""

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

from unmask import durable
from unmask.errors import UserError

_MANIFEST = "manifest.json"


class Work:
    """Holds `folder` (usually `OUT.partial`) until `close`, for one preparation.

    Raises:
        UserError: it is held already, belongs to another preparation, or cannot be written.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.store = folder / "store"
        self._shards = folder / "shards"
        self._shards.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "lock").open("w")
        try:
            self._hold()
            self._check(json.loads(json.dumps(identity)))
        except UserError:
            self.close()
            raise

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def shard(self, number: int) -> Path:
        """Where the shard of this number is, or will be."""
        return self._shards / f"{number:08d}.npz"

    def close(self) -> None:
        self._lock.close()

    def delete(self) -> None:
        shutil.rmtree(self.folder)

    def _hold(self) -> None:
        """An flock: it ends with the process, however that ends."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder}: another process works here; wait for it, or use another --out") from None

    def _check(self, identity: dict[str, Any]) -> None:
        path = self.folder / _MANIFEST
        if not path.exists():
            durable.write(path, json.dumps(identity, indent=1) + "\n")
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
