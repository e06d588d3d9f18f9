"""Attention patterns: full, causal, or block by block (block diffusion: Arriola et al. 2025, 2503.09573).

Dimensions: B rows, H heads, E width of a head; L places of a row in blocks of S; W positions of one stream or of two.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Heads = Float[Tensor, "B H W E"]


@dataclass(frozen=True)
class AttentionPattern:
    """A rule for which positions see which, in one stream or in two.

    With two streams, the first `noisy` of W positions are the noisy stream `xt` and the others the clean stream `x0`;
    both start at place 0. A noisy block sees itself and the clean blocks before it; a clean block sees the clean blocks
    up to itself. `noisy=0` is one stream, in which a position sees its own block and all before it; with `size=1` this
    is causal attention.

    Args:
        size: S; None: one stream in which every position sees every other.
        noisy: positions of the noisy stream: L, or 0 for one stream.
    """

    size: int | None = None
    noisy: int = 0

    @property
    def is_causal(self) -> bool:
        return self.size == 1 and self.noisy == 0

    def is_full(self, width: int) -> bool:
        """True if every one of `width` positions sees every other: there is only one block."""
        return self.size is None or self.size >= width

    def num_blocks(self, width: int) -> int:
        """Counts the blocks of a row, whose `width` positions are of one stream or of two."""
        return 1 if self.size is None else -(-(self.noisy or width) // self.size)

    def visible_until(self, place: Int[Tensor, "*rows n"]) -> Int[Tensor, "*rows n"]:
        """Returns the first place that a clean position at `place` does not see. Not for `size=None`."""
        assert self.size is not None, "without blocks everything is visible"
        return (place // self.size + 1) * self.size

    def rule(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Returns a function `(query, key) -> sees`, of positions in 0 .. W - 1. Not for `size=None`."""
        size, noisy = self.size, self.noisy
        assert size is not None, "without blocks there is no rule"
        return lambda query, key: torch.where(
            key < noisy,
            (query < noisy) & (query // size == key // size),
            (key - noisy) // size + (query < noisy) <= (query - noisy * (query >= noisy)) // size,
        )

    def by_block(self, attend: Callable[[Heads, Heads, Heads], Heads], q: Heads, k: Heads, v: Heads) -> Heads:
        """Calls `attend` for each block, with its queries and the keys and values they see.

        It needs no mask, and computes no score that a mask would throw away.
        """
        if self.size is None or self.is_full(q.shape[2]):
            return attend(q, k, v)
        clean_k, clean_v = k[:, :, self.noisy :], v[:, :, self.noisy :]
        parts = []
        for start in range(0, self.noisy, self.size):
            own = slice(start, min(start + self.size, self.noisy))
            keys = torch.cat([clean_k[:, :, :start], k[:, :, own]], dim=2)
            values = torch.cat([clean_v[:, :, :start], v[:, :, own]], dim=2)
            parts.append(attend(q[:, :, own], keys, values))
        for start in range(0, clean_k.shape[2], self.size):
            end = start + self.size
            queries = q[:, :, self.noisy + start : self.noisy + end]
            parts.append(attend(queries, clean_k[:, :, :end], clean_v[:, :, :end]))
        return torch.cat(parts, dim=2)


EVERYTHING = AttentionPattern()


def num_clean(length: int, size: int) -> int:
    """Counts the positions of a row's clean stream: all but those of the last block, which no position sees."""
    return (length - 1) // size * size
