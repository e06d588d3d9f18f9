"""The gradient of a matrix that is both embedding and head.

The head's V x D gradient is dense; the embedding's has a few rows that are not zero. Autograd would allocate both and
add them: hundreds of megabytes each, with a vocabulary of 150 000. Here the few rows are added to the head's in place.

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
    """Slot in which the head's backward pass leaves its gradient for the embedding's, which runs later.

    One slot belongs to one forward pass. Autograd keeps the head's gradient until both backward passes have run, and
    only then passes it on, so adding to it in place is safe.
    """

    of_head: Float[Tensor, "V D"] | None = None

    def take(self) -> Float[Tensor, "V D"] | None:
        """Returns the gradient and empties the slot."""
        # Without a second reference autograd can use the tensor as the parameter's gradient, and need not copy it.
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
        # Where the head has left its own, this adds to it in place, and autograd must not add the rows again: None.
        total = grad.new_zeros(ctx.shape) if of_head is None else of_head
        total.index_add_(0, xt.flatten(), grad.flatten(0, 1).to(total.dtype))
        return None, total if of_head is None else None, None


_LOOKUP: Callable[[Tensor, Tensor, TiedGradient], Tensor] = _Lookup.apply


def lookup(xt: Int[Tensor, "B L"], weight: Float[Tensor, "V D"], tied: TiedGradient | None) -> Float[Tensor, "B L D"]:
    """Returns `weight[xt]`; with `tied`, its gradient is added to the one that the head has left there."""
    return F.embedding(xt, weight) if tied is None else _LOOKUP(xt, weight, tied)
