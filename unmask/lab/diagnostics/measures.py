"""The statistics of the diagnostics: means in bins, distances to visible tokens, and MMD^2 between sets of masks.

Dimensions: R examples, K bins, M tokens; B rows, L positions; P and Q masks, S positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from unmask.errors import UserError


class NotApplicable(UserError):
    """The run has no such thing as a diagnostic measures; the other diagnostics go on."""


NOWHERE = 2**31 - 1
"""The distance if nothing is visible on that side."""
WIDTH = 0.25
"""Bandwidth h of the kernel: masks that differ at a quarter of the maskable positions have k = 1 / e."""


@dataclass(frozen=True)
class Bin:
    """The mean of one quantity over the tokens for which another quantity is in (low, high]."""

    low: float
    high: float
    at: float
    """The mean of that other quantity in the bin."""
    value: float
    stderr: float
    """nan if all tokens come from one example."""
    share: float
    """The bin's share of the weight in all bins."""
    tokens: int


class Bins:
    """Weighted means of the tokens in each of the bins (edges[k], edges[k + 1]].

    With S_rk and W_rk the sums of `weight x value` and of `weight` of example r in bin k, the mean is
    `sum_r S_rk / sum_r W_rk`. Tokens of one example are not independent, so the standard error is that of a ratio over
    independent examples, as in `evaluation/nelbo.py`.
    """

    def __init__(self, edges: Sequence[float], num_examples: int) -> None:
        self.edges = torch.tensor(edges, dtype=torch.float64)
        shape = (num_examples, len(edges) - 1)
        self._value, self._weight, self._at, self._count = (torch.zeros(shape, dtype=torch.float64) for _ in range(4))

    def add(
        self,
        example: Int[Tensor, "M"],
        at: Shaped[Tensor, "M"],
        weight: Shaped[Tensor, "M"],
        value: Float[Tensor, "M"],
    ) -> None:
        """Adds tokens of the examples numbered `example`. Tokens outside all bins are ignored."""
        number = torch.searchsorted(self.edges, at.double()) - 1
        inside = (number >= 0) & (number < self._value.shape[1])
        index = (example[inside], number[inside])
        weight = weight.double()[inside]
        for table, each in (
            (self._value, weight * value.double()[inside]),
            (self._weight, weight),
            (self._at, weight * at.double()[inside]),
            (self._count, torch.ones_like(weight)),
        ):
            table.index_put_(index, each, accumulate=True)

    def means(self) -> list[Bin]:
        """Returns the bins that hold any tokens."""
        total = self._weight.sum(dim=0)
        mean = self._value.sum(dim=0) / total
        rows = len(self._value)
        residual = self._value - mean * self._weight
        num_holding = (self._weight > 0).sum(dim=0)
        error = ((residual**2).sum(dim=0) * rows / max(1, rows - 1)).sqrt() / total
        return [
            Bin(
                low=self.edges[k].item(),
                high=self.edges[k + 1].item(),
                at=(self._at[:, k].sum() / total[k]).item(),
                value=mean[k].item(),
                stderr=error[k].item() if num_holding[k] > 1 else nan,
                share=(total[k] / total.sum()).item(),
                tokens=int(self._count[:, k].sum()),
            )
            for k in total.nonzero().flatten().tolist()
        ]


def bin_index(count: Int[Tensor, "*b"], total: Int[Tensor, "*#b"], num_bins: int) -> Int[Tensor, "*b"]:
    """Returns the k for which count / total is in (k / num_bins, (k + 1) / num_bins]; -1 where the count is 0.

    Computed in integers, so that shares at an edge fall into the right bin.
    """
    return -(-count * num_bins).div(total.clamp(min=1), rounding_mode="floor") - 1


def distance_to_visible(
    is_masked: Bool[Tensor, "B L"], block_size: int | None = None
) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"]]:
    """Counts the positions to the nearest visible one on the left and on the right.

    The neighbour is at distance 1, and a visible position at distance 0 from itself. In blocks, a position sees
    everything before its block, whether it is masked or not, and nothing after it.
    """
    length = is_masked.shape[1]
    position = torch.arange(length, device=is_masked.device)
    start = position // (block_size or length) * (block_size or length)
    end = start + (block_size or length)
    left = torch.where(is_masked, -1, position).cummax(dim=1).values.maximum(start - 1)
    right = torch.where(is_masked, length, position).flip(1).cummin(dim=1).values.flip(1)
    return (
        torch.where(left < 0, NOWHERE, position - left),
        torch.where(right >= end, NOWHERE, right - position),
    )


@dataclass(frozen=True)
class MaskSet:
    """Masks of one canvas, in independent copies.

    The masks of one copy belong together: they are one decoding, or the time that an example spends in a pool.
    """

    is_masked: Bool[Tensor, "P S"]
    copy: Int[Tensor, "P"]

    def where(self, is_kept: Bool[Tensor, "P"]) -> "MaskSet":
        return MaskSet(self.is_masked[is_kept], self.copy[is_kept])

    @property
    def is_enough(self) -> bool:
        """True if there are masks of at least two copies."""
        return len(self.copy.unique()) > 1


def kernel(x: Bool[Tensor, "P S"], y: Bool[Tensor, "Q S"], num_maskable: int) -> Float[Tensor, "P Q"]:
    """Computes `exp(-H / (h L_b))`, with H the Hamming distance of each pair of masks."""
    return torch.exp(-hamming(x, y) / (WIDTH * num_maskable))


def hamming(x: Bool[Tensor, "P S"], y: Bool[Tensor, "Q S"]) -> Float[Tensor, "P Q"]:
    """Counts the positions at which exactly one mask of each pair is masked."""
    a, b = x.double(), y.double()
    return a.sum(dim=1, keepdim=True) + b.sum(dim=1) - 2 * a @ b.T


def mmd2(x: MaskSet, y: MaskSet, num_maskable: int) -> float:
    """Estimates the squared maximum mean discrepancy of two sets of masks (Gretton et al. 2012, JMLR 13).

    The estimate is `E k(x, x') + E k(y, y') - 2 E k(x, y)`, with x and x' (y and y') from different copies. It is
    unbiased: 0 on average if both have one distribution, so it may be negative. Each side needs two copies.
    """
    across = kernel(x.is_masked, y.is_masked, num_maskable).mean()
    return (_within(x, num_maskable) + _within(y, num_maskable) - 2 * across).item()


def _within(x: MaskSet, num_maskable: int) -> Tensor:
    return kernel(x.is_masked, x.is_masked, num_maskable)[x.copy.unsqueeze(1) != x.copy].mean()
