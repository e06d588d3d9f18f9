"""The squared maximum mean discrepancy of two sets of masks, with a kernel of their Hamming distance (2012, Gretton et
al., JMLR 13).

Dimensions: P and Q masks, S positions.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

WIDTH = 0.25
"""h of the kernel: masks that differ at a quarter of the maskable positions have k = 1 / e."""


@dataclass(frozen=True)
class Masks:
    """Masks of one example. Those of one copy belong together: a trajectory of decoding, a row's life in a pool. Copies
    are independent of each other."""

    is_masked: Bool[Tensor, "P S"]
    copy: Int[Tensor, "P"]

    def where(self, is_kept: Bool[Tensor, "P"]) -> "Masks":
        return Masks(self.is_masked[is_kept], self.copy[is_kept])

    @property
    def is_enough(self) -> bool:
        """Whether there are masks of two copies."""
        return len(self.copy.unique()) > 1


def kernel(x: Bool[Tensor, "P S"], y: Bool[Tensor, "Q S"], num_maskable: int) -> Float[Tensor, "P Q"]:
    """`exp(-H / (h L_b))`, H their Hamming distance."""
    return torch.exp(-hamming(x, y) / (WIDTH * num_maskable))


def hamming(x: Bool[Tensor, "P S"], y: Bool[Tensor, "Q S"]) -> Float[Tensor, "P Q"]:
    """The number of positions at which one is masked and the other is not."""
    a, b = x.double(), y.double()
    return a.sum(dim=1, keepdim=True) + b.sum(dim=1) - 2 * a @ b.T


def mmd2(x: Masks, y: Masks, num_maskable: int) -> float:
    """`E k(x, x') + E k(y, y') - 2 E k(x, y)`, x and x' (y and y') from different copies: 0 on average where the two
    have one distribution, so that it may come out below 0. Each side needs two copies."""
    across = kernel(x.is_masked, y.is_masked, num_maskable).mean()
    return (_within(x, num_maskable) + _within(y, num_maskable) - 2 * across).item()


def _within(x: Masks, num_maskable: int) -> Tensor:
    return kernel(x.is_masked, x.is_masked, num_maskable)[x.copy.unsqueeze(1) != x.copy].mean()
