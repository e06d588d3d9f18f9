"""Who sees whom: everyone everyone, causally, or block by block (block diffusion: Arriola et al. 2025, 2503.09573).

Dimensions: B rows, H heads, E width of a head; L places of a row in blocks of S; W positions, of one stream or of two.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Heads = Float[Tensor, "B H W E"]


@dataclass(frozen=True)
class AttentionPattern:
    """Of W positions the first `noisy` are the noisy stream `xt`, the others the clean one `x0`, both from place 0 on.

    A noisy block sees itself and the clean blocks before it; a clean block the clean blocks up to itself. So `noisy=0`
    is one stream in which a position sees its own block and all before, and with `size=1` that is causal attention.

    Args:
        size: S; None: there is one stream, and every position sees every other.
        noisy: positions of the noisy stream, L or none.
    """

    size: int | None = None
    noisy: int = 0

    @property
    def is_causal(self) -> bool:
        return self.size == 1 and self.noisy == 0

    def is_full(self, width: int) -> bool:
        """Whether every one of `width` positions sees every other: there is one block."""
        return self.size is None or self.size >= width

    def num_blocks(self, width: int) -> int:
        """Of a row, whose `width` positions are of one stream or of two."""
        return 1 if self.size is None else -(-(self.noisy or width) // self.size)

    def visible_until(self, place: Int[Tensor, "*rows n"]) -> Int[Tensor, "*rows n"]:
        """The first place that a clean one at `place` does not see. Not for `size=None`."""
        assert self.size is not None, "without blocks there is no horizon"
        return (place // self.size + 1) * self.size

    def rule(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Whether the position `query` sees the position `key`, both of 0 .. W - 1. Not for `size=None`."""
        size, noisy = self.size, self.noisy
        assert size is not None, "without blocks there is no rule"
        return lambda query, key: torch.where(
            key < noisy,
            (query < noisy) & (query // size == key // size),
            (key - noisy) // size + (query < noisy) <= (query - noisy * (query >= noisy)) // size,
        )

    def by_block(self, attend: Callable[[Heads, Heads, Heads], Heads], q: Heads, k: Heads, v: Heads) -> Heads:
        """Attention without a mask: `attend` gets the queries of a block and what they see, block after block.

        So nothing is computed that is not seen.
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
    """Positions of the clean stream of a row: all but those of the last block, which nobody sees."""
    return (length - 1) // size * size
