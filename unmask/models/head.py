"""The output head for large vocabularies: what is asked of a prediction, without all of its logits at once.

The vocabulary is cut into chunks c, and a chunk is a distribution of its own: `p(v) = w_c p_c(v)`, with `w_c` the
chunk's probability. Statistics of every `p_c` and their log-sum-exp are enough to tell those of p.
Dimensions: M positions, D width, V vocabulary, C values in a chunk, N chunks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from unmask.types import TokenStats, at_least_fp32

CHUNK = 1024
"""Values at a time. Fewer add to the gradient of the hidden states more often, more leave a CPU's caches."""

# --- confidences: a chunk's share, and what the shares say together --------------------------------------------------


@dataclass(frozen=True)
class Streamed:
    """A confidence of `reveal.CONFIDENCES`, chunk by chunk.

    `share(shifted, exps, total)` may overwrite its first two arguments: the chunk's logits minus the largest of them,
    and `exps = exp(shifted)`, whose sums are `total`. `join(weights, best, shares)` takes the chunks' probabilities
    `w_c`, their largest probabilities `max_v p_c(v)` and what `share` returned.
    """

    share: Callable[[Tensor, Tensor, Tensor], Tensor]
    join: Callable[[Tensor, Tensor, Tensor], Tensor]


def _best(shifted: Float[Tensor, "M C"], exps: Float[Tensor, "M C"], total: Float[Tensor, "M"]) -> Float[Tensor, "M"]:
    """`max_v p_c(v)`: the largest logit was shifted to 0."""
    return total.reciprocal()


def _join_best(
    weights: Float[Tensor, "N M"], best: Float[Tensor, "N M"], shares: Float[Tensor, "N M"]
) -> Float[Tensor, "M"]:
    """`max_c w_c max_v p_c(v)`."""
    return (weights * best).amax(dim=0)


def _second(shifted: Float[Tensor, "M C"], exps: Float[Tensor, "M C"], total: Float[Tensor, "M"]) -> Float[Tensor, "M"]:
    """The second largest `p_c(v)`; 0 in a chunk of one value."""
    largest = exps.max(dim=-1, keepdim=True).indices  # on CPUs `argmax` and `topk` take more than twice the time
    return exps.scatter_(-1, largest, 0.0).amax(dim=-1) / total


def _join_second(
    weights: Float[Tensor, "N M"], best: Float[Tensor, "N M"], shares: Float[Tensor, "N M"]
) -> Float[Tensor, "M"]:
    """The lead of the largest `w_c p_c(v)` over the second largest, which are among the two largest of each chunk."""
    first, second = torch.cat([weights * best, weights * shares]).topk(2, dim=0).values
    return first - second


def _neg_entropy(
    shifted: Float[Tensor, "M C"], exps: Float[Tensor, "M C"], total: Float[Tensor, "M"]
) -> Float[Tensor, "M"]:
    """`sum_v p_c(v) log p_c(v)`."""
    return shifted.mul_(exps).sum(dim=-1) / total - total.log()


def _join_neg_entropy(
    weights: Float[Tensor, "N M"], best: Float[Tensor, "N M"], shares: Float[Tensor, "N M"]
) -> Float[Tensor, "M"]:
    """The chain rule: `sum_c w_c (log w_c + sum_v p_c(v) log p_c(v))`."""
    return (weights * shares - torch.special.entr(weights)).sum(dim=0)


STREAMED: dict[str, Streamed] = {
    "prob": Streamed(share=_best, join=_join_best),
    "margin": Streamed(share=_second, join=_join_second),
    "neg_entropy": Streamed(share=_neg_entropy, join=_join_neg_entropy),
}

# --- the head --------------------------------------------------------------------------------------------------------


def token_stats(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    x0: Int[Tensor, "M"],
    *,
    mask_id: int,
    confidence: str = "prob",
    chunk: int = CHUNK,
) -> TokenStats:
    """`TokenStats.from_logits` of `hidden @ weight.T`, the mask token's logit being -inf, in M x `chunk` of memory."""
    head = _Head(dtype=_product_dtype(hidden), mask_id=mask_id, chunk=chunk, confidence=STREAMED[confidence])
    nll, surety, top1 = _statistics(hidden, weight, x0, head)
    return TokenStats(nll=nll, confidence=surety, top1=top1)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The format that `F.linear` would compute in. Autocast spares fp64."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


@dataclass(frozen=True, kw_only=True)
class _Head:
    """What the forward and the backward pass have in common."""

    dtype: torch.dtype
    mask_id: int
    chunk: int
    confidence: Streamed

    def chunks(self, hidden: Float[Tensor, "M D"], weight: Float[Tensor, "V D"]) -> Iterator["_Chunk"]:
        """Each in turn, in the same memory: a fresh piece for each would be handed to us by the system page by page."""
        size = len(hidden) * min(self.chunk, len(weight))
        memory = torch.empty(size, dtype=torch.promote_types(self.dtype, torch.float32), device=hidden.device)
        for start in range(0, len(weight), self.chunk):
            part = weight[start : start + self.chunk].to(self.dtype)
            logits = memory[: len(hidden) * len(part)].view(len(hidden), len(part)).copy_(F.linear(hidden, part))
            if start <= self.mask_id < start + len(part):
                # -inf would make a chunk of the mask token alone NaN
                logits[:, self.mask_id - start] = torch.finfo(logits.dtype).min
            yield _Chunk(start=start, weight=part, logits=logits)


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """The values `start` to `start + C`."""

    start: int
    weight: Float[Tensor, "C D"]
    logits: Float[Tensor, "M C"]

    def find(self, x0: Int[Tensor, "M"]) -> tuple[Int[Tensor, "M 1"], Float[Tensor, "M 1"]]:
        """The column of `x0`, and 1 where it is one of ours, else 0: as many of them as positions, wherever x0 is."""
        column = (x0 - self.start).unsqueeze(-1)
        inside = column.clamp(0, len(self.weight) - 1)
        return inside, (column == inside).to(self.logits.dtype)

    def summary(self, x0: Int[Tensor, "M"], share: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Float[Tensor, "4 M"]:
        """Log-sum-exp, largest probability, a confidence's share; the logit of x0, or 0. Overwrites the logits."""
        column, is_inside = self.find(x0)
        target = self.logits.gather(-1, column) * is_inside
        largest = self.logits.amax(dim=-1, keepdim=True)
        shifted = self.logits.sub_(largest)
        exps = shifted.exp()
        total = exps.sum(dim=-1)
        log_total, best = largest.squeeze(-1) + total.log(), total.reciprocal()
        return torch.stack([log_total, best, share(shifted, exps, total), target.squeeze(-1)])

    def error(self, x0: Int[Tensor, "M"], log_total: Float[Tensor, "M"]) -> Float[Tensor, "M C"]:
        """`p - onehot(x0)`, subtracted before it is rounded: p may be close to 1. Overwrites the logits."""
        column, is_inside = self.find(x0)
        p = self.logits.sub_(log_total.unsqueeze(-1)).exp_()
        return p.scatter_add_(-1, column, -is_inside).to(self.weight.dtype)


class _Statistics(torch.autograd.Function):
    """`(hidden, weight, x0) -> (nll, confidence, top1)`, the latter two without gradient.

    With `p = softmax(hidden @ weight.T)`, `error = p - onehot(x0)`, and g the gradient of the loss by `nll`:
    `d_hidden = g * (error @ weight)` and `d_weight = error.T @ (g * hidden)`. The backward pass computes the logits
    again. Chunks are taken from the vocabulary, not from the positions, so that each writes its own rows of `d_weight`
    once; what they all add to, `d_hidden`, is smaller.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Float[Tensor, "M D"], weight: Float[Tensor, "V D"], x0: Int[Tensor, "M"], head: _Head
    ) -> tuple[Float[Tensor, "M"], Float[Tensor, "M"], Float[Tensor, "M"]]:
        chunks = head.chunks(hidden.to(head.dtype), weight)
        summaries = [chunk.summary(x0, head.confidence.share) for chunk in chunks]
        log_totals, best, shares, targets = torch.stack(summaries, dim=1)
        log_total = log_totals.logsumexp(dim=0)
        weights = (log_totals - log_total).exp()
        ctx.head = head
        ctx.save_for_backward(hidden, weight, x0, log_total)
        confidence, top1 = head.confidence.join(weights, best, shares), _join_best(weights, best, best)
        ctx.mark_non_differentiable(confidence, top1)
        return log_total - targets.sum(dim=0), confidence, top1

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Float[Tensor, "M"], *_: Tensor
    ) -> tuple[Float[Tensor, "M D"], Float[Tensor, "V D"] | None, None, None]:
        hidden, weight, x0, log_total = ctx.saved_tensors
        g = grad.unsqueeze(-1)
        scaled = (hidden * g).to(ctx.head.dtype)  # M x D to multiply, where the errors are M x V
        d_hidden = at_least_fp32(torch.zeros_like(hidden))
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for chunk in ctx.head.chunks(hidden.to(ctx.head.dtype), weight):
            error = chunk.error(x0, log_total)
            d_hidden += error @ chunk.weight
            if d_weight is not None:
                # on CPUs the product of a transposed view takes longer in bfloat16 than this copy and the plain one
                d_weight[chunk.start : chunk.start + len(chunk.weight)] = error.T.contiguous() @ scaled
        return (d_hidden * g).to(hidden.dtype), d_weight, None, None


# A compiler would unroll the chunks: thousands of operations at 150 000 values. Compiled callers pause here instead.
_statistics: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.compiler.disable(_Statistics.apply)
