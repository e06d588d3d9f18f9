"""Checkpoints: safetensors and JSON in a folder that is either whole or ignored. There is no pickle in them.

`checkpoints/step_00000500/` is written aside, synced and renamed; `COMPLETE`, written last, holds a SHA-256 of every
other file. A folder without it, or that fails it, is skipped and named. Files that it does not list are not looked at.
Where each of several processes has a share of the model, each writes its own, and the main one all the rest.

Whether weights are of a model.
"""

import copy
import hashlib
import json
import re
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from unmask import files
from unmask.errors import UserError
from unmask.peers import ALONE, Peers
from unmask.training import shares
from unmask.training.shares import LazyTensor, TensorShard

_COMPLETE = "COMPLETE"
_STATE = "state.json"
_TENSORS = ".safetensors"
_SEPARATOR = "/"
_NAME = re.compile(r"step_\d{8,}")
_PATIENCE = 30.0
_LEFT_BEHIND = (".writing_", ".removing_")  # by a process that died meanwhile


def save(folder: Path, step: int, state: dict[str, Any], peers: Peers = ALONE) -> Path:
    """Writes `state`, a nested dict of tensors and JSON values, as the checkpoint of `step`; returns its folder.

    Of `peers`, each of which has `TensorShard`s in its state, all call this, on one file system.

    Raises:
        OSError: it cannot be written, by one of them. All that was there before is still there.
    """
    target = folder / f"step_{step:08d}"
    aside = folder / f".writing_{target.name}"
    unique_key = f"{peers.unique_key()}: {target.name}"
    if not peers.is_main:
        _add_shares(aside, state, peers, unique_key)
        return target
    try:
        files.remove(aside)
        files.make_folder(aside)
        peers.kv_set(f"{unique_key}, is there")
        checksums = _write_tensors(aside, state, peers) | _added_shares(aside, peers, unique_key)
        _finish(aside, target, state, checksums)
    except OSError as error:
        with suppress(OSError):
            files.remove(aside)  # a full disk needs the room
        peers.kv_set(f"{unique_key}, end", str(error))
        peers.kv_set(f"{unique_key}, is there")  # or it would be waited for
        raise
    peers.kv_set(f"{unique_key}, end")
    return target


def _finish(aside: Path, target: Path, state: dict[str, Any], checksums: dict[str, str]) -> None:
    """What makes the files of `aside`, which are synced, a checkpoint."""
    _, rest = _split(state)
    files.put(aside / _STATE, json.dumps(rest, indent=1))
    files.sync(aside / _STATE)
    checksums |= {_STATE: _checksum(aside / _STATE)}
    files.put(aside / _COMPLETE, json.dumps(dict(sorted(checksums.items())), indent=1))
    files.sync(aside / _COMPLETE)
    files.sync(aside)
    old = target.with_name(f".removing_{target.name}")
    if target.exists():  # a run that ended in an evaluation is saved again when it has made up for it
        files.remove(old)
        files.rename(target, old)
    files.rename(aside, target)
    files.sync(target.parent)
    files.sync(target.parent.parent)
    files.remove(old)


def _write_tensors(aside: Path, state: dict[str, Any], peers: Peers) -> dict[str, str]:
    """One file a section, and one for the shares of it; returns the checksums of the files, which are synced."""
    tensors, _ = _split(state)
    written = []
    for section in sorted({name.split(_SEPARATOR)[0] for name in tensors}):
        own = {name: value for name, value in tensors.items() if name.split(_SEPARATOR)[0] == section}
        whole = {name: value.contiguous() for name, value in own.items() if isinstance(value, Tensor)}
        if whole and peers.is_main:
            written.append(aside / f"{section}{_TENSORS}")
            files.put_tensors(written[-1], whole)
        if shared := {name: value for name, value in own.items() if isinstance(value, TensorShard)}:
            written.append(aside / f"{section}-{peers.rank + 1:05d}-of-{peers.size:05d}{_TENSORS}")
            shares.write(written[-1], shared)
    for path in written:
        files.sync(path)
    return {path.name: _checksum(path) for path in written}


def _add_shares(aside: Path, state: dict[str, Any], peers: Peers, unique_key: str) -> None:
    """This process's files of a checkpoint that the main one makes, and waits until that has ended."""
    peers.kv_get(f"{unique_key}, is there")
    problem, checksums = "", {}
    try:
        checksums = _write_tensors(aside, state, peers)
    except OSError as error:
        problem = f"rank {peers.rank}: {error}"
    peers.kv_set(f"{unique_key}, rank {peers.rank}", json.dumps([problem, checksums]))
    if ended := peers.kv_get(f"{unique_key}, end"):
        raise OSError(ended)


def _added_shares(aside: Path, peers: Peers, unique_key: str) -> dict[str, str]:
    """The checksums of the others' files.

    Raises:
        OSError: they could not write them, or they are not where this process sees them.
    """
    found: dict[str, str] = {}
    for rank in range(1, peers.size):
        problem, checksums = json.loads(peers.kv_get(f"{unique_key}, rank {rank}"))
        if problem:
            raise OSError(problem)
        if missing := [name for name in checksums if not _appears(aside / name)]:
            raise OSError(
                f"{aside}: rank {rank} wrote {missing[0]}, but not here; put the run where all processes see it"
            )
        found |= checksums
    return found


def _appears(path: Path) -> bool:
    """Whether a file that another machine has written is seen here: a network's file system may take seconds."""
    deadline = time.monotonic() + _PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def snapshot(state: Any) -> Any:
    """`state` as it is now, on the CPU: it can be saved while training goes on."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, TensorShard):
        return replace(state, own=snapshot(state.own))
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    return copy.deepcopy(state)


def load(path: Path, *, unread: Collection[str] = ()) -> dict[str, Any]:
    """Reads the checkpoint folder `path`, tensors on the CPU; those of the sections `unread` are `LazyTensor`."""
    found = {name: _read(stored, name.split(_SEPARATOR)[0] in unread) for name, stored in _tensors(path).items()}
    return _join(found, json.loads((path / _STATE).read_text()))


def load_part(path: Path, part: str) -> dict[str, Tensor]:
    """The tensors of a dict within the state, `model` or `ema/shadow`; empty if it has none."""
    prefix = part + _SEPARATOR
    stored = _tensors(path)
    return {name.removeprefix(prefix): stored[name].whole() for name in stored if name.startswith(prefix)}


def _tensors(path: Path) -> dict[str, LazyTensor]:
    return shares.read(path / name for name in _listed(path) if name.endswith(_TENSORS))


def _read(stored: LazyTensor, is_left: bool) -> Tensor | LazyTensor:
    return stored if is_left else stored.whole()


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, ascending; whether they are whole is not looked at.

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
    """What is wrong with the checkpoint folder `path`, or None if it is whole."""
    try:
        return _first_damage(path)
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, RecursionError) as error:
        return str(error)


def _first_damage(path: Path) -> str | None:
    checksums = _listed(path)
    for name, expected in checksums.items():
        if _checksum(path / name) != expected:
            return f"{name} does not match its checksum"
        if name.endswith(_TENSORS) and (problem := _not_tensors(path / name)):
            return f"{name}: {problem}"
    if not isinstance(json.loads((path / _STATE).read_text()), dict):
        return f"{_STATE} holds no state"
    return None


def _not_tensors(path: Path) -> str | None:
    """What is wrong with a file of tensors, as its head shows."""
    try:
        shares.read([path])
    except SafetensorError as error:
        return str(error)
    return None


def _listed(path: Path) -> dict[str, str]:
    """The files of a checkpoint, and their checksums.

    Raises:
        ValueError: `COMPLETE` does not list them.
    """
    checksums = json.loads((path / _COMPLETE).read_text())
    if not isinstance(checksums, dict) or _STATE not in checksums:
        raise ValueError(f"{_COMPLETE} does not list {_STATE}")
    return checksums


def newest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint; `warn` is told of every newer one that is not."""
    for step in reversed(steps(folder)):
        path = folder / f"step_{step:08d}"
        problem = damage(path)
        if problem is None:
            return path
        warn(f"skipping checkpoint {path}: {problem}")
    return None


def find(run: Path, which: str, warn: Callable[[str], None]) -> Path:
    """The checkpoint of `run` that `which` asks for: `last`, `best`, or a step.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder = run / "checkpoints"
    last = newest(folder, warn)
    if last is None:
        raise UserError(
            f"{run}: no complete checkpoint; is it a run folder, and has it trained to its first checkpoint?"
        )
    if which == "last":
        return last
    step = best_step(last) if which == "best" else _as_step(which, run)
    path = folder / f"step_{step:08d}"
    if step not in steps(folder):
        raise UserError(f"{run}: no checkpoint of step {step}; there are {', '.join(map(str, steps(folder)))}")
    if problem := damage(path):
        raise UserError(f"{path}: {problem}; choose another with --step")
    return path


def step_of(path: Path) -> int:
    """The step that the checkpoint folder `path` is named after."""
    return int(path.name.removeprefix("step_"))


def best_step(path: Path) -> int:
    """The best step so far, as the checkpoint `path` knows it; its own if nothing was evaluated."""
    state = json.loads((path / _STATE).read_text())
    best = state["progress"]["best_step"]
    return best if best is not None else state["progress"]["step"]


def _as_step(which: str, run: Path) -> int:
    try:
        return int(which)
    except ValueError:
        raise UserError(f"--step {which}: use a number, `last` or `best` (run {run})") from None


def put_in_place(folder: Path) -> None:
    """What a process that died had written as a whole, but not renamed yet, becomes a checkpoint."""
    for aside in sorted(folder.glob(".writing_step_*")):
        target = folder / aside.name.removeprefix(".writing_")
        if not target.exists() and damage(aside) is None:
            files.rename(aside, target)


def set_aside(folder: Path, after: int) -> None:
    """Renames the checkpoints of steps above `after`, which are damaged, so that they do not count as the newest.

    What a process that died was writing or deleting is deleted.
    """
    for step in steps(folder):
        if step > after:
            target = folder / f"damaged_step_{step:08d}"
            files.remove(target)
            files.rename(folder / f"step_{step:08d}", target)
    for path in folder.iterdir() if folder.exists() else ():
        if path.name.startswith(_LEFT_BEHIND):
            files.remove(path)


def prune(folder: Path, *, keep_last: int, keep_every: int | None, keep: set[int]) -> None:
    """Deletes all checkpoints but the newest, the multiples of `keep_every`, and the steps in `keep`."""
    present = steps(folder)
    for step in present[:-keep_last]:
        if step not in keep and not (keep_every and step % keep_every == 0):
            aside = folder / f".removing_step_{step:08d}"  # half deleted, it would count as damaged
            files.rename(folder / f"step_{step:08d}", aside)
            files.remove(aside)


def _split(state: dict[str, Any], prefix: str = "") -> tuple[dict[str, Tensor | TensorShard], dict[str, Any]]:
    """Tensors by path, and the tree of all that is not a tensor."""
    tensors: dict[str, Tensor | TensorShard] = {}
    rest: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            tensors[prefix + key] = value.detach()
        elif isinstance(value, TensorShard):
            tensors[prefix + key] = value
        elif isinstance(value, dict):
            inner, rest[key] = _split(value, f"{prefix}{key}{_SEPARATOR}")
            tensors |= inner
        else:
            rest[key] = value
    return tensors, rest


def _join(tensors: Mapping[str, Tensor | LazyTensor], rest: dict[str, Any]) -> dict[str, Any]:
    for name, tensor in tensors.items():
        *path, last = name.split(_SEPARATOR)
        place = rest
        for key in path:
            place = place[key]
        place[last] = tensor
    return rest


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """The first tensors of `other` whose shapes are not those of `own`, in words; empty where all are."""
    wrong = [name for name in sorted({*own, *other}) if _shape(own, name) != _shape(other, name)]
    return "; ".join(f"{name} is {_shape(other, name)}, here {_shape(own, name)}" for name in wrong[:3])


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | str:
    return tuple(tensors[name].shape) if name in tensors else "missing"
