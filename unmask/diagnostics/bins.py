"""Means by bin, whose standard errors know that the tokens of one example are no independent draws.

Dimensions: R examples, K bins, M tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Bin:
    """The mean of a quantity where another is in (low, high]."""

    low: float
    high: float
    at: float
    """The mean of that other quantity in the bin."""
    value: float
    stderr: float
    """nan where the tokens are of one example."""
    share: float
    """Of the weight that all bins hold."""
    tokens: int


class Bins:
    """Weighted means of what falls into the bins (edges[k], edges[k + 1]].

    With S_rk and W_rk the sums of `weight x value` and of `weight` of example r in bin k, the mean is
    `sum_r S_rk / sum_r W_rk`, and its standard error that of a ratio over independent examples, as in
    `evaluation/nelbo.py`.
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
        """Tokens of these examples; those that are outside of all bins do not count."""
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
        """Of the bins that hold anything."""
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


def bin_of(count: Int[Tensor, "*b"], total: Int[Tensor, "*#b"], num_bins: int) -> Int[Tensor, "*b"]:
    """k where count / total is in (k / num_bins, (k + 1) / num_bins], in whole numbers; -1 where the count is 0."""
    return -(-count * num_bins).div(total.clamp(min=1), rounding_mode="floor") - 1
