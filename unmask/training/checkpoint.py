"""Checkpoints: safetensors and JSON, without pickle, in a folder that is either complete or ignored.

`checkpoints/step_00000500/` is written aside, synced and renamed; `COMPLETE`, written last, holds a SHA-256 of every
other file. A folder without it, or that fails it, is skipped with a warning. Files that it does not list are ignored.
If the model is sharded, each process writes its own shards, and rank 0 everything else.
"""

import copy
import hashlib
import json
import re
import stat
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from unmask import files, formats, machine
from unmask.errors import UserError
from unmask.models.on_demand import OnDemand
from unmask.peers import ALONE, Peers
from unmask.training import parallel
from unmask.training.parallel import LazyTensor, TensorShard
from unmask.training.state import SEPARATOR, Progress, join, progress_of, split

COMPLETE = "COMPLETE"
_STATE = "state.json"
_TENSORS = ".safetensors"
_NAME = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,15})")
_PLAIN = re.compile(r"(?!\.\.?$)[A-Za-z0-9_.-]{1,200}")
_PATIENCE = 30.0
_REMOVING = ".removing_"
_UNFINISHED = (files.ASIDE, _REMOVING)  # how names begin of what a process that died was writing or deleting


def save(folder: Path, step: int, state: dict[str, Any], peers: Peers = ALONE) -> Path:
    """Writes `state`, a nested dict of tensors and JSON values, as the checkpoint of `step`; returns its folder.

    With `TensorShard`s in the state it is collective, and all `peers` need the same file system.

    Raises:
        OSError: one of the processes could not write. The checkpoints from before are still there.
    """
    target = path_of(folder, step)
    aside = folder / f"{files.ASIDE}{target.name}"
    unique_key = f"{peers.unique_key()}: {target.name}"
    if not peers.is_main:
        _write_shards(aside, state, peers, unique_key)
        return target
    # Runs in a thread beside training, so processes talk through the key-value store: a collective would mix with
    # those of the training step.
    try:
        files.remove(aside)
        files.make_folder(aside)
        peers.kv_set(f"{unique_key}, is there")
        checksums = _write_tensors(aside, state, peers) | _wait_for_shards(aside, peers, unique_key)
        _finish(aside, target, state, checksums)
    except OSError as error:
        peers.kv_set(f"{unique_key}, end", str(error))
        peers.kv_set(f"{unique_key}, is there")  # if making it failed, the others still wait for this key
        with suppress(OSError):
            if not isinstance(error, TimeoutError):
                _wait_for_answers(peers, unique_key)  # one that still writes would write into what is being removed
        with suppress(OSError):
            files.remove(aside)  # frees the room on a full disk
        raise
    peers.kv_set(f"{unique_key}, end")
    return target


def _finish(aside: Path, target: Path, state: dict[str, Any], checksums: dict[str, str]) -> None:
    """Turns the folder `aside`, whose tensor files are synced, into the checkpoint `target`."""
    # The order matters. Every file is on the disk before COMPLETE names it, and COMPLETE before the rename gives the
    # folder its name: whenever the power goes, a folder with the final name is complete.
    _, rest = split(state)
    files.put(aside / _STATE, formats.to_json(rest, indent=1))
    files.sync(aside / _STATE)
    checksums |= {_STATE: _checksum(aside / _STATE)}
    files.put(aside / COMPLETE, json.dumps(dict(sorted(checksums.items())), indent=1))
    files.sync(aside / COMPLETE)
    files.sync(aside)
    old = target.with_name(f"{_REMOVING}{target.name}")
    # A run that was stopped in its last evaluation saves this step again once it has evaluated. A folder that is not
    # empty cannot be replaced by a rename, so the old one is renamed, and deleted when the new one is in its place.
    if target.exists():
        files.remove(old)
        files.rename(target, old)
    files.rename(aside, target)
    files.sync(target.parent)
    files.sync(target.parent.parent)
    files.remove(old)


def _write_tensors(aside: Path, state: dict[str, Any], peers: Peers) -> dict[str, str]:
    """Writes and syncs a file for each section, and one for its shards; returns the files' checksums."""
    tensors, _ = split(state)
    written = []
    for section in sorted({name.split(SEPARATOR)[0] for name in tensors}):
        own = {name: value for name, value in tensors.items() if name.split(SEPARATOR)[0] == section}
        whole = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        if whole and peers.is_main:
            written.append(aside / f"{section}{_TENSORS}")
            files.put_tensors(written[-1], whole)
        if shared := {name: value for name, value in own.items() if isinstance(value, TensorShard)}:
            written.append(aside / parallel.file_name(section, peers.rank, peers.size))
            parallel.write(written[-1], shared)
    for path in written:
        files.sync(path)
    return {path.name: _checksum(path) for path in written}


def _write_shards(aside: Path, state: dict[str, Any], peers: Peers, unique_key: str) -> None:
    """Writes this process's shards into the folder that rank 0 makes, and waits until the checkpoint is complete."""
    peers.kv_get(f"{unique_key}, is there")
    problem, checksums = "", {}
    try:
        checksums = _write_tensors(aside, state, peers)
    except OSError as error:
        problem = f"rank {peers.rank}: {error}"
    peers.kv_set(f"{unique_key}, rank {peers.rank}", json.dumps([problem, checksums]))
    if ended := peers.kv_get(f"{unique_key}, end"):
        raise OSError(ended)


def _wait_for_shards(aside: Path, peers: Peers, unique_key: str) -> dict[str, str]:
    """Waits until the other processes have written their shards; returns the files' checksums.

    Raises:
        OSError: one could not write, or its files do not appear on this machine.
    """
    found: dict[str, str] = {}
    for rank, (problem, checksums) in _wait_for_answers(peers, unique_key).items():
        if problem:
            raise OSError(problem)
        if missing := [name for name in checksums if not _appears(aside / name)]:
            raise OSError(
                f"{aside}: rank {rank} wrote {missing[0]}, but not here; put the run where all processes see it"
            )
        found |= checksums
    return found


def _wait_for_answers(peers: Peers, unique_key: str) -> dict[int, list[Any]]:
    """Waits until every other process has written or failed; returns [problem, files' checksums] by rank."""
    return {rank: json.loads(peers.kv_get(f"{unique_key}, rank {rank}")) for rank in range(1, peers.size)}


def _appears(path: Path) -> bool:
    """True if `path`, written by another machine, is seen here within half a minute."""
    # A network file system may take seconds to show it.
    deadline = time.monotonic() + _PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def snapshot(state: Any) -> Any:
    """Copies `state` to the CPU, so that it can be saved while training goes on."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, TensorShard):
        return replace(state, own=snapshot(state.own))
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    return copy.deepcopy(state)


def load(path: Path, *, unread: Collection[str] = ()) -> dict[str, Any]:
    """Reads the checkpoint folder `path`, with tensors on the CPU, and `LazyTensor`s in the sections `unread`.

    Raises:
        UserError: it holds no state, or tensors that have no place in it.
    """
    found = {
        name: stored if name.split(SEPARATOR)[0] in unread else stored.whole()
        for name, stored in _tensors(path).items()
    }
    return join(found, load_rest(path), str(path / _STATE))


def load_part(path: Path, part: str) -> OnDemand:
    """Returns the tensors of one dict of the state, such as `model` or `ema/shadow`, read when asked for; or none.

    Raises:
        UserError: they cannot be read.
    """
    prefix, stored = part + SEPARATOR, _tensors(path).items()
    return parallel.on_demand({name.removeprefix(prefix): each for name, each in stored if name.startswith(prefix)})


def read_progress(path: Path) -> Progress:
    """Reads the counters of the checkpoint folder `path`.

    Raises:
        UserError: they are wrong, or not of the step in its name.
    """
    return progress_of(load_rest(path), str(path / _STATE), step_of(path))


def load_rest(path: Path) -> dict[str, Any]:
    """Reads everything of the checkpoint folder `path` but its tensors.

    Raises:
        UserError: it is no JSON object; names the file.
    """
    # Runs of 2026 hold Infinity where there was no evaluation yet.
    found: dict[str, Any] = formats.read_json(path / _STATE, dict[str, Any], infinity_as_null=True)
    return found


def _tensors(path: Path) -> dict[str, LazyTensor]:
    try:
        found = parallel.read(path / name for name in _listed(path) if name.endswith(_TENSORS))
        for name, stored in found.items():
            stored.check()
            for file in stored.files():
                if name.split(SEPARATOR)[0] != parallel.section_of(file):
                    raise ValueError(f"{file}: holds {name[:200]}, which has no place there")
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: {error}; take another checkpoint") from error
    return found


def steps(folder: Path) -> list[int]:
    """Lists the steps of the checkpoints in `folder`, ascending, damaged ones included.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        return sorted(step_of(path) for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error}") from error


def damage(path: Path) -> str | None:
    """Returns the damage of the checkpoint folder `path` in words, or None if it is complete."""
    try:
        return _first_damage(path)
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, RecursionError) as error:
        return str(error)


def _first_damage(path: Path) -> str | None:
    checksums = _listed(path)
    # Most of the time of opening a run is spent here; hashing lets other threads run.
    with ThreadPoolExecutor(machine.cpus()) as pool:
        found = [*pool.map(_checksum, (path / name for name in checksums))]
    for (name, expected), own in zip(checksums.items(), found, strict=True):
        if own != expected:
            return f"{name} does not match its checksum"
        if name.endswith(_TENSORS) and (problem := _not_tensors(path / name)):
            return f"{name}: {problem}"
    load_rest(path)
    return None


def _not_tensors(path: Path) -> str | None:
    """Returns the damage that the head of a file of tensors shows, or None."""
    try:
        parallel.read([path])
    except SafetensorError as error:
        return str(error)
    return None


def _listed(path: Path) -> dict[str, str]:
    """Reads the names of a checkpoint's files, with their checksums.

    Raises:
        ValueError: `COMPLETE` does not list them, or lists what is no file of the checkpoint.
    """
    _check_regular(path / COMPLETE)
    checksums: dict[str, str] = formats.read_json(path / COMPLETE, dict[str, str])
    if _STATE not in checksums:
        raise ValueError(f"{COMPLETE} does not list {_STATE}")
    for name in checksums:
        if not _PLAIN.fullmatch(name):
            raise ValueError(f"{COMPLETE} lists {name[:100]!r}, which is no name of a file in the checkpoint")
        _check_regular(path / name)
        if missing := parallel.files_beside(name) - checksums.keys():
            raise ValueError(f"{COMPLETE} lists {name}, but not {min(missing)}")
    return checksums


def _check_regular(file: Path) -> None:
    if not stat.S_ISREG((file.stat() if files.follows_links() else file.lstat()).st_mode):
        raise ValueError(f"{file.name} is no regular file")


def newest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Returns the newest complete checkpoint, or None; calls `warn` for every damaged one that is newer."""
    for step in reversed(steps(folder)):
        path = path_of(folder, step)
        problem = damage(path)
        if problem is None:
            return path
        warn(f"skipping checkpoint {path}: {problem}")
    return None


def find(run: Path, which: str, warn: Callable[[str], None]) -> Path:
    """Finds the checkpoint `which` of `run`: `last`, `best`, or a step.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder = run / "checkpoints"
    last = newest(folder, warn)
    if last is None:
        fix = "bring one back, or train into another folder" if steps(folder) else "has it trained to the first one?"
        raise UserError(f"{run}: no complete checkpoint; {fix}")
    step = step_of(last) if which == "last" else best_step(last) if which == "best" else _as_step(which, run)
    path = path_of(folder, step)
    if path == last:  # was just found to be whole
        return path
    if step not in steps(folder):
        raise UserError(f"{run}: no checkpoint of step {step}; there are {', '.join(map(str, steps(folder)))}")
    if problem := damage(path):
        raise UserError(f"{path}: {problem}; choose another with --step")
    return path


def path_of(folder: Path, step: int) -> Path:
    """Returns the folder of the checkpoint of `step`, in the `folder` of all."""
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Returns the step in the name of the checkpoint folder `path`."""
    return int(path.name.removeprefix("step_"))


def best_step(path: Path) -> int:
    """Returns the best step so far that the checkpoint `path` records; its own step if nothing was evaluated.

    Raises:
        UserError: its counters are damaged.
    """
    progress = Progress.read(load_rest(path).get("progress"), str(path / _STATE))
    return progress.step if progress.best_step is None else progress.best_step


def _as_step(which: str, run: Path) -> int:
    try:
        return int(which)
    except ValueError:
        raise UserError(f"--step {which}: use a number, `last` or `best` (run {run})") from None


def put_in_place(folder: Path) -> None:
    """Renames checkpoints that a process had completed, but not renamed, when it died."""
    for aside in sorted(folder.glob(f"{files.ASIDE}step_*")):
        target = folder / aside.name.removeprefix(files.ASIDE)
        if not aside.is_symlink() and not target.exists() and damage(aside) is None:
            files.rename(aside, target)


def set_aside(folder: Path, after: int) -> None:
    """Renames the checkpoints of steps above `after`, which are damaged, so that none counts as the newest.

    Also deletes what a process that died was writing or deleting.
    """
    for path in [path_of(folder, step) for step in steps(folder) if step > after]:
        target = path.with_name(f"damaged_{path.name}")
        files.remove(target)
        files.rename(path, target)
    for path in folder.iterdir() if folder.exists() else ():
        if path.name.startswith(_UNFINISHED):
            files.remove(path)


def prune(folder: Path, *, keep_last: int, keep_every: int | None, keep: set[int]) -> None:
    """Deletes all checkpoints but the newest, the multiples of `keep_every`, and the steps in `keep`."""
    old = [s for s in steps(folder)[:-keep_last] if s not in keep and not (keep_every and s % keep_every == 0)]
    for path in [path_of(folder, step) for step in old]:
        aside = path.with_name(f"{_REMOVING}{path.name}")  # half deleted, it would count as damaged
        files.rename(path, aside)
        files.remove(aside)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
