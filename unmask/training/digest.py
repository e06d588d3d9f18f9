"""A digest of weights: the same wherever they lie, and in whatever format they are stored."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from unmask.machine import cpus

_KIND = "v2-"
_PART = 2**18
"""Numbers that are hashed at once: they stay in a core's cache. Digests depend on it."""
_FORMATS = (torch.bfloat16, torch.float32)


class WeightsDigest:
    """A SHA-256 of names, shapes and values, each part of a tensor in the narrowest format that holds it.

    That is bfloat16, fp32 or fp64: weights that were rounded to bfloat16 and stored in fp32 have the digest of those
    in bfloat16. The parts of a tensor are hashed on all CPUs.

    Args:
        like: a digest to compare with, which an older version may have made: of fp32, without `v2-` before it. This
            one is made in the same way.
    """

    def __init__(self, like: str | None = None) -> None:
        self.is_older = is_older(like)
        self._checksum = hashlib.sha256()

    def add(self, name: str, value: Tensor) -> None:
        """Adds a tensor. All come in the order of their names."""
        value = value.detach()
        self._checksum.update(json.dumps([name, [*value.shape]]).encode())
        if self.is_older:
            wide = value.to(torch.promote_types(value.dtype, torch.float32))
            self._checksum.update(wide.contiguous().numpy().data)
            return
        with ThreadPoolExecutor(cpus()) as pool:  # tensors and hashes let other threads go on
            for part in pool.map(_hash, value.flatten().split(_PART)):
                self._checksum.update(part)

    def hexdigest(self) -> str:
        return ("" if self.is_older else _KIND) + self._checksum.hexdigest()


def weights_digest(tensors: Mapping[str, Tensor], like: str | None = None) -> str:
    """Returns the `WeightsDigest` of `tensors`, of which one is read at a time, in the same way as `like`."""
    found = WeightsDigest(like)
    for name in sorted(tensors):
        found.add(name, tensors[name])
    return found.hexdigest()


def is_older(digest: Any) -> bool:
    """True if it is a digest that an older version made, of fp32."""
    return isinstance(digest, str) and not digest.startswith(_KIND)


def _hash(part: Tensor) -> bytes:
    part = _narrowest(part)
    checksum = hashlib.sha256(str(part.dtype).encode())
    checksum.update(part.view(torch.uint8).numpy().data)
    return checksum.digest()


def _narrowest(part: Tensor) -> Tensor:
    """Returns the same values in the narrowest format that holds them; whole numbers as they are."""
    if not part.is_floating_point():
        return part
    part = part.to(torch.promote_types(part.dtype, torch.bfloat16))
    return next((part.to(dtype) for dtype in _FORMATS if _holds(dtype, part[:64]) and _holds(dtype, part)), part)


def _holds(dtype: torch.dtype, part: Tensor) -> bool:
    return dtype == part.dtype or part.to(dtype).to(part.dtype).equal(part)
