"""The output head for large vocabularies: what is asked of a prediction, without all of its logits at once.

The vocabulary is cut into chunks c, and a chunk is a distribution of its own: `p(v) = w_c p_c(v)`, with `w_c` the
chunk's probability. Statistics of every `p_c` and their log-sum-exp are enough to tell those of p. A chunk's logits lie
with a row for each value, so that both products of the backward pass take the errors as they are.
Dimensions: M positions, D width, V vocabulary, C values in a chunk, N chunks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from unmask.models.tied import TiedGradient
from unmask.types import Prediction, Query, TokenStats, at_least_fp32

CHUNK = 1024
"""Values at a time. Fewer add to the gradient of the hidden states more often, more leave a CPU's caches."""

# --- confidences: a chunk's share, and what the shares say together --------------------------------------------------


@dataclass(frozen=True)
class Streamed:
    """A confidence of `reveal.CONFIDENCES`, chunk by chunk.

    `share(shifted, exps, total)` takes the chunk's logits minus the largest of them, and `exps = exp(shifted)`, whose
    sums over the chunk are `total`. `join(weights, best, shares)` takes the chunks' probabilities `w_c`, their largest
    probabilities `max_v p_c(v)` and what `share` returned.
    """

    share: Callable[[Tensor, Tensor, Tensor], Tensor]
    join: Callable[[Tensor, Tensor, Tensor], Tensor]


def _best(shifted: Float[Tensor, "C M"], exps: Float[Tensor, "C M"], total: Float[Tensor, "M"]) -> Float[Tensor, "M"]:
    """`max_v p_c(v)`: the largest logit was shifted to 0."""
    return total.reciprocal()


def _join_best(
    weights: Float[Tensor, "N M"], best: Float[Tensor, "N M"], shares: Float[Tensor, "N M"]
) -> Float[Tensor, "M"]:
    """`max_c w_c max_v p_c(v)`."""
    return (weights * best).amax(dim=0)


def _second(shifted: Float[Tensor, "C M"], exps: Float[Tensor, "C M"], total: Float[Tensor, "M"]) -> Float[Tensor, "M"]:
    """The second largest `p_c(v)`; 0 in a chunk of one value."""
    largest = exps.max(dim=0).indices
    value = torch.arange(len(exps), device=exps.device).unsqueeze(1)
    return torch.where(value == largest, 0.0, exps).amax(dim=0) / total


def _join_second(
    weights: Float[Tensor, "N M"], best: Float[Tensor, "N M"], shares: Float[Tensor, "N M"]
) -> Float[Tensor, "M"]:
    """The lead of the largest `w_c p_c(v)` over the second largest, which are among the two largest of each chunk."""
    first, second = torch.cat([weights * best, weights * shares]).topk(2, dim=0).values
    return first - second


def _neg_entropy(
    shifted: Float[Tensor, "C M"], exps: Float[Tensor, "C M"], total: Float[Tensor, "M"]
) -> Float[Tensor, "M"]:
    """`sum_v p_c(v) log p_c(v)`."""
    return (shifted * exps).sum(dim=0) / total - total.log()


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

# --- what is computed of a chunk: one pass each over its logits, where they are compiled -----------------------------


def _summarise(logits: Float[Tensor, "C M"], *confidences: str) -> Float[Tensor, "K M"]:
    """Log-sum-exp, largest probability, and each confidence's share."""
    x = at_least_fp32(logits)
    largest = x.amax(dim=0)
    shifted = x - largest
    exps = shifted.exp()
    total = exps.sum(dim=0)
    shares = [STREAMED[confidence].share(shifted, exps, total) for confidence in confidences]
    return torch.stack([largest + total.log(), total.reciprocal(), *shares])


def _summarise_with_target(
    logits: Float[Tensor, "C M"], target: Int[Tensor, "M"], confidence: str
) -> Float[Tensor, "4 M"]:
    """`_summarise`, and the logit of the value `target`, or 0 where that is elsewhere."""
    of_target = torch.where(_is_target(logits, target), at_least_fp32(logits), 0.0).sum(dim=0)
    return torch.cat([_summarise(logits, confidence), of_target.unsqueeze(0)])


def _largest(scores: Float[Tensor, "C M"]) -> tuple[Float[Tensor, "M"], Int[Tensor, "M"]]:
    """The largest score and its value, the lowest among equals. (`max` with indices takes a CPU twice as long.)"""
    best = scores.amax(dim=0)
    value = torch.arange(len(scores), device=scores.device).unsqueeze(1)
    return best, torch.where(scores == best, value, len(scores) - 1).amin(dim=0)


def _errors(
    logits: Float[Tensor, "C M"], target: Int[Tensor, "M"], log_total: Float[Tensor, "M"]
) -> Float[Tensor, "C M"]:
    """`p - onehot(target)`, subtracted before it is rounded: p may be close to 1."""
    p = (at_least_fp32(logits) - log_total).exp()
    return torch.where(_is_target(logits, target), p - 1, p).to(logits.dtype)


def _is_target(logits: Float[Tensor, "C M"], target: Int[Tensor, "M"]) -> Tensor:
    return torch.arange(len(logits), device=logits.device).unsqueeze(1) == target


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """For any number of positions and values: these change with every step, and in the last chunk."""
    return torch.compile(function, dynamic=True)


# --- the head --------------------------------------------------------------------------------------------------------


def token_stats(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    x0: Int[Tensor, "M"],
    *,
    mask_id: int,
    confidence: str = "prob",
    chunk: int = CHUNK,
    is_compiled: bool = False,
    tied: TiedGradient | None = None,
) -> TokenStats:
    """`TokenStats.from_logits` of `hidden @ weight.T`, the mask token's logit being -inf, in M x `chunk` of memory.

    The gradient of `weight` is also left in `tied`.
    """
    head = _Head(
        dtype=_product_dtype(hidden),
        mask_id=mask_id,
        chunk=chunk,
        confidence=confidence,
        is_compiled=is_compiled,
        tied=tied,
    )
    nll, surety, top1 = _statistics(hidden, weight, x0, head)
    return TokenStats(nll=nll, confidence=surety, top1=top1, statistic=confidence)


@torch.no_grad()
def prediction(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    ask: Query,
    *,
    mask_id: int,
    chunk: int = CHUNK,
    is_compiled: bool = False,
) -> Prediction:
    """`Prediction.from_logits` of `hidden @ weight.T`, the mask token's logit being -inf, in M x `chunk` of memory."""
    head = _Head(
        dtype=_product_dtype(hidden),
        mask_id=mask_id,
        forbidden=ask.forbidden,
        chunk=chunk,
        confidence=ask.confidence,
        is_compiled=is_compiled,
    )
    confidences = (ask.confidence, "neg_entropy") if ask.has_entropy else (ask.confidence,)
    given = torch.full((len(hidden),), mask_id, device=hidden.device) if ask.given is None else ask.given
    row = torch.arange(len(hidden), device=hidden.device)
    summaries, guesses, choices, of_given = [], [], [], []
    for part in head.chunks(hidden.to(head.dtype), weight):
        summaries.append(head.run(_summarise, part.logits, *confidences))
        guesses.append(part.pick(head.run(_largest, part.logits)))
        of_given.append(part.logits_of(given))
        if ask.perturb is not None and not ask.is_truncated:
            choices.append(part.pick(_largest(ask.perturb(at_least_fp32(part.logits).T, row, part.tokens).T)))
    (confidence, *entropy), top1, log_total = _joined(torch.stack(summaries, dim=1), *confidences)
    likeliest, logit = _first_of_largest(guesses)
    values = likeliest
    if ask.perturb is not None:
        values, logit = _from_whole_rows(hidden, weight, ask, head) if ask.is_truncated else _first_of_largest(choices)
    log_prob = torch.where(given == mask_id, logit, torch.stack(of_given).sum(dim=0)) - log_total
    return Prediction(
        likeliest=likeliest,
        values=torch.where(given == mask_id, values, given),
        log_prob=log_prob,
        confidence=confidence,
        top1=top1,
        entropy=-entropy[0] if entropy else None,
    )


@torch.no_grad()
def expected_value(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    embedding: Float[Tensor, "V D"],
    *,
    mask_id: int,
    forbidden: Int[Tensor, "F"] | None = None,
    chunk: int = CHUNK,
) -> Float[Tensor, "M D"]:
    """`softmax(hidden @ weight.T) @ embedding`, the mask token's logit being -inf, in M x `chunk` of memory.

    Sums are kept relative to the largest logit so far (Milakov and Gimelshein 2018, 1805.02867).
    """
    head = _Head(dtype=_product_dtype(hidden), mask_id=mask_id, forbidden=forbidden, chunk=chunk, confidence="prob")
    total = at_least_fp32(hidden.new_zeros(len(hidden)))
    largest, summed = torch.full_like(total, -torch.inf), at_least_fp32(torch.zeros_like(hidden))
    for part in head.chunks(hidden.to(head.dtype), weight):
        logits = at_least_fp32(part.logits)
        before, largest = largest, largest.maximum(logits.amax(dim=0))
        exps, kept = (logits - largest).exp(), (before - largest).exp()
        values = embedding[part.start : part.start + len(exps)].to(head.dtype)
        total = total * kept + exps.sum(dim=0)
        summed = summed * kept.unsqueeze(1) + exps.to(head.dtype).T @ values
    return summed / total.unsqueeze(1)


def _first_of_largest(found: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Int[Tensor, "M"], Float[Tensor, "M"]]:
    """The value and the logit of the largest of the chunks' largest scores, the first among equals."""
    scores, values, logits = (torch.stack(part) for part in zip(*found, strict=True))
    first = _largest(scores)[1].unsqueeze(0)
    return values.gather(0, first).squeeze(0), logits.gather(0, first).squeeze(0)


def _from_whole_rows(
    hidden: Float[Tensor, "M D"], weight: Float[Tensor, "V D"], ask: Query, head: "_Head"
) -> tuple[Int[Tensor, "M"], Float[Tensor, "M"]]:
    """The chosen values and their logits, of as many positions at a time as fill M x chunk with all of their logits."""
    assert ask.perturb is not None
    found = []
    tokens = torch.arange(len(weight), device=hidden.device)
    size = max(1, len(hidden) * head.chunk // len(weight))
    for row in torch.arange(len(hidden), device=hidden.device).split(size):
        logits = hidden.new_empty(len(row), len(weight), dtype=head.dtype)
        for part in head.chunks(hidden[row].to(head.dtype), weight):
            logits[:, part.start : part.start + len(part.logits)] = part.logits.T
        logits = at_least_fp32(logits)
        value = ask.perturb(logits, row, tokens).argmax(dim=-1)
        found.append((value, logits.gather(-1, value.unsqueeze(-1)).squeeze(-1)))
    values, chosen = (torch.cat(part) for part in zip(*found, strict=True))
    return values, chosen


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The format that `F.linear` would compute in. Autocast spares fp64."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """The values `start` to `start + C`."""

    start: int
    weight: Float[Tensor, "C D"]
    logits: Float[Tensor, "C M"]

    @property
    def tokens(self) -> Int[Tensor, "C"]:
        return torch.arange(self.start, self.start + len(self.logits), device=self.logits.device)

    def pick(self, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """A score, the value that a row of this chunk stands for, and its logit."""
        value = found[1] + self.start
        return found[0], value, self.logits_of(value)

    def logits_of(self, value: Int[Tensor, "M"]) -> Float[Tensor, "M"]:
        """Each position's logit of `value`; 0 where that is elsewhere, and -inf where nothing is to be it."""
        row = value - self.start
        is_here = (row >= 0) & (row < len(self.logits))
        logit = self.logits.gather(0, row.clamp(0, len(self.logits) - 1).unsqueeze(0)).squeeze(0)
        is_never = logit == torch.finfo(logit.dtype).min
        return at_least_fp32(torch.where(is_here, logit.masked_fill(is_never, -torch.inf), 0.0))


@dataclass(frozen=True, kw_only=True)
class _Head:
    """What the forward and the backward pass have in common."""

    dtype: torch.dtype
    mask_id: int
    chunk: int
    confidence: str
    forbidden: Int[Tensor, "F"] | None = None
    is_compiled: bool = False
    tied: TiedGradient | None = None

    def chunks(self, hidden: Float[Tensor, "M D"], weight: Float[Tensor, "V D"]) -> Iterator[_Chunk]:
        """Each in turn, in the same memory: a fresh piece for each would be handed to us by the system page by page."""
        memory = hidden.new_empty(min(self.chunk, len(weight)) * len(hidden))
        for start in range(0, len(weight), self.chunk):
            part = weight[start : start + self.chunk].to(self.dtype)
            logits = memory[: len(part) * len(hidden)].view(len(part), len(hidden))
            torch.mm(part, hidden.T, out=logits)
            if start <= self.mask_id < start + len(part):
                # -inf would make a chunk of the mask token alone NaN
                logits[self.mask_id - start] = torch.finfo(logits.dtype).min
            chunk = _Chunk(start=start, weight=part, logits=logits)
            if self.forbidden is not None:
                is_never = torch.isin(chunk.tokens, self.forbidden).unsqueeze(1)
                logits.masked_fill_(is_never, torch.finfo(logits.dtype).min)
            yield chunk

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return (_compiled(function) if self.is_compiled else function)(*arguments)


def _joined(summaries: Float[Tensor, "K N M"], *confidences: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """Confidences, largest probability and log-sum-exp, each (M,), of the chunks together."""
    log_totals, best, *shares = summaries
    log_total = log_totals.logsumexp(dim=0)
    weights = (log_totals - log_total).exp()
    joined = [STREAMED[name].join(weights, best, share) for name, share in zip(confidences, shares, strict=True)]
    return joined, _join_best(weights, best, best), log_total


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
        summaries = [
            head.run(_summarise_with_target, part.logits, x0 - part.start, head.confidence)
            for part in head.chunks(hidden.to(head.dtype), weight)
        ]
        *shares, targets = torch.stack(summaries, dim=1)
        (confidence,), top1, log_total = _joined(torch.stack(shares), head.confidence)
        ctx.head = head
        ctx.save_for_backward(hidden, weight, x0, log_total)
        ctx.mark_non_differentiable(confidence, top1)
        return log_total - targets.sum(dim=0), confidence, top1

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Float[Tensor, "M"], *_: Tensor
    ) -> tuple[Float[Tensor, "M D"], Float[Tensor, "V D"] | None, None, None]:
        hidden, weight, x0, log_total = ctx.saved_tensors
        head, g = ctx.head, grad.unsqueeze(-1)
        scaled = (hidden * g).to(head.dtype)  # M x D to multiply, where the errors are V x M
        d_hidden = at_least_fp32(torch.zeros_like(hidden.T))
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for part in head.chunks(hidden.to(head.dtype), weight):
            error = head.run(_errors, part.logits, x0 - part.start, log_total)
            # some CPUs take longer for the product of a transposed view than for this small copy and the plain product
            d_hidden += part.weight.T.contiguous() @ error
            if d_weight is not None:
                d_weight[part.start : part.start + len(error)] = error @ scaled
        if head.tied is not None:
            head.tied.of_head = d_weight
        return (d_hidden.T * g).to(hidden.dtype), d_weight, None, None


# A compiler would unroll the chunks: thousands of operations at 150 000 values. Compiled callers pause here instead.
_statistics: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.compiler.disable(_Statistics.apply, recursive=False)
