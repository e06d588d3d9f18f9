"""Files of tensor shards: each process writes its own, and a reader reads only the rows it needs.

The layout is that of `torch.distributed.checkpoint`'s `HuggingFaceStorageWriter`, and PyTorch's reader can read it:
safetensors files, whose head holds the offset of each tensor in the whole. It needs no pickle, and no exchange between
processes, so that a thread can write it while they train.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from unmask import files

_OFFSETS = "DCP_SHARDING_INFO"
_OFFSET = "saved_offsets"


@dataclass(frozen=True)
class TensorShard:
    """The rows of a tensor, from `start` on, that one process holds."""

    own: Tensor
    start: int


class LazyTensor:
    """A tensor in one or several files, each with some of its rows, read when it is indexed."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[Any, str]] = {}
        """Open file and name in it, by the first row there."""

    def add(self, start: int, file: Any, name: str) -> None:
        self._parts[start] = file, name

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = [(start, self._shape(*part)) for start, part in self._parts.items()]
        first = shapes[0][1]
        return (max(start + shape[0] for start, shape in shapes), *first[1:]) if first else first

    @staticmethod
    def _shape(file: Any, name: str) -> tuple[int, ...]:
        return tuple(file.get_slice(name).get_shape())

    def __getitem__(self, rows: slice) -> Tensor:
        """Reads these rows.

        Raises:
            ValueError: not all of them are in the files.
        """
        first, last, _ = rows.indices(self.shape[0])
        found = []
        for start, (file, name) in sorted(self._parts.items()):
            stop = start + self._shape(file, name)[0]
            if start < last and stop > first:
                found.append(file.get_slice(name)[max(first, start) - start : min(last, stop) - start])
        if not found and first >= last:
            file, name = self._parts[min(self._parts)]
            return file.get_slice(name)[0:0]
        if sum(map(len, found)) != last - first:
            raise ValueError(f"{name}: rows {first} to {last} are not all there")
        return found[0] if len(found) == 1 else torch.cat(found)

    def whole(self) -> Tensor:
        if len(self._parts) == 1:
            ((file, name),) = self._parts.values()
            return file.get_tensor(name)
        return self[:]


def write(path: Path, shares: dict[str, TensorShard]) -> None:
    """Writes the shards of one process, by tensor name; leaves out shards without rows."""
    held = {name: share for name, share in shares.items() if len(share.own)}
    offsets = {name: {_OFFSET: [share.start] + [0] * (share.own.ndim - 1)} for name, share in held.items()}
    metadata = {"format": "pt", "DCP_VERSION": "1.0", _OFFSETS: json.dumps(offsets)}
    files.put_tensors(path, {name: share.own.contiguous() for name, share in held.items()}, metadata)


def read(paths: Iterable[Path]) -> dict[str, LazyTensor]:
    """Returns the tensors in these files, whole or sharded, by name.

    Raises:
        SafetensorError: not such a file.
        ValueError: the offsets in a file are malformed.
    """
    found: dict[str, LazyTensor] = {}
    for path in paths:
        file: Any = safe_open(path, framework="pt")
        offsets = json.loads((file.metadata() or {}).get(_OFFSETS, "{}"))
        for name in file.keys():  # noqa: SIM118 - no mapping
            found.setdefault(name, LazyTensor()).add(_start(offsets, name), file, name)
    return found


def _start(offsets: Any, name: str) -> int:
    try:
        start: int = (offsets[name][_OFFSET] or [0])[0] if name in offsets else 0
    except (TypeError, KeyError) as error:
        raise ValueError(f"{_OFFSETS} says nothing of where {name} begins") from error
    return start
