"""The gradient of a matrix that is both embedding and head.

Of the embedding's V x D gradient a step fills a few rows, the head's is dense. Autograd would make both and add them:
hundreds of megabytes each, with 150 000 values. Here the few rows are added into the head's gradient, in place.
Dimensions: B rows, L positions, D width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


@dataclass
class TiedGradient:
    """Where the head's backward pass leaves its gradient for the embedding's, of the same forward pass, which is later.

    Autograd holds on to it until both have run, and only then passes it on.
    """

    of_head: Float[Tensor, "V D"] | None = None

    def take(self) -> Float[Tensor, "V D"] | None:
        """It is then autograd's alone, which need not copy it."""
        gradient, self.of_head = self.of_head, None
        return gradient


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, xt: Int[Tensor, "B L"], weight: Float[Tensor, "V D"], tied: TiedGradient
    ) -> Float[Tensor, "B L D"]:
        ctx.save_for_backward(xt)
        ctx.tied, ctx.shape = tied, weight.shape
        return F.embedding(xt, weight)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "B L D"]) -> tuple[None, Float[Tensor, "V D"] | None, None]:
        (xt,) = ctx.saved_tensors
        of_head = ctx.tied.take()
        total = grad.new_zeros(ctx.shape) if of_head is None else of_head
        total.index_add_(0, xt.flatten(), grad.flatten(0, 1).to(total.dtype))
        return None, total if of_head is None else None, None


_LOOKUP: Callable[[Tensor, Tensor, TiedGradient], Tensor] = _Lookup.apply


def lookup(xt: Int[Tensor, "B L"], weight: Float[Tensor, "V D"], tied: TiedGradient | None) -> Float[Tensor, "B L D"]:
    """`weight[xt]`; with `tied`, its gradient goes where the head has left its own."""
    return F.embedding(xt, weight) if tied is None else _LOOKUP(xt, weight, tied)
