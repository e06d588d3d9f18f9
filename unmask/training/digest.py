"""A digest of weights: the same wherever they lie, and in whatever format they are stored."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from unmask.data.fingerprint import digest_of
from unmask.machine import cpus

_KIND = "v2-"
_PART = 2**18
"""Numbers that are hashed at once: they stay in a core's cache. Digests depend on it."""
_FORMATS = (torch.bfloat16, torch.float32)


def weights_digest(tensors: Mapping[str, Tensor], like: str | None = None) -> str:
    """Returns a SHA-256 of names, shapes and values, each part of a tensor in the narrowest format that holds it.

    That is bfloat16, fp32 or fp64: weights that were rounded to bfloat16 and stored in fp32 have the digest of those
    in bfloat16. One tensor is read at a time; its parts are hashed on all CPUs.

    Args:
        tensors: the weights, by name.
        like: a digest to compare with, which an older version may have made: of fp32, without `v2-` before it. The one
            returned is made in the same way.
    """
    if is_older(like):
        return digest_of(_wide_parts(tensors))
    checksum = hashlib.sha256()
    with ThreadPoolExecutor(cpus()) as pool:  # tensors and hashes let other threads go on
        for name in sorted(tensors):
            value = tensors[name].detach()
            checksum.update(json.dumps([name, [*value.shape]]).encode())
            for part in pool.map(_hash, value.flatten().split(_PART)):
                checksum.update(part)
    return _KIND + checksum.hexdigest()


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


def _wide_parts(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    for name in sorted(tensors):
        value = tensors[name].detach()
        yield [name, [*value.shape]]
        yield value.to(torch.promote_types(value.dtype, torch.float32)).contiguous().numpy()
