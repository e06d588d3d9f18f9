"""The output head for large vocabularies: statistics, predictions and gradients without all logits in memory.

The vocabulary is cut into chunks c, and each chunk is a distribution of its own: `p(v) = w_c p_c(v)`, with `w_c` the
chunk's probability. The statistics of every `p_c`, with its log-sum-exp, are enough to compute those of p. A chunk's
logits are stored with a row for each value, as both products of the backward pass need the errors.

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
"""Vocabulary entries per chunk. Smaller: more accumulations into d_hidden. Larger: spills out of CPU cache."""
_WHOLE, _CACHED = 2**24, 2**19  # logits that a query which needs whole rows holds, and works on, at once

# --- confidences: the share of each chunk, and how the shares are joined ---------------------------------------------


@dataclass(frozen=True)
class Streamed:
    """A confidence of `reveal.CONFIDENCES`, computed chunk by chunk.

    `share(shifted, exps, total)` takes the chunk's logits minus the largest of them, and `exps = exp(shifted)`, whose
    sums over the chunk are `total`. `join(weights, best, shares)` takes the chunks' probabilities `w_c`, their largest
    probabilities `max_v p_c(v)`, and the results of `share`.
    """

    share: Callable[[Tensor, Tensor, Tensor], Tensor]
    join: Callable[[Tensor, Tensor, Tensor], Tensor]


def _best(shifted: Float[Tensor, "C M"], exps: Float[Tensor, "C M"], total: Float[Tensor, "M"]) -> Float[Tensor, "M"]:
    """Computes `max_v p_c(v)`: the largest logit is shifted to 0, so its exponential is 1."""
    return total.reciprocal()


def _join_best(
    weights: Float[Tensor, "N M"], best: Float[Tensor, "N M"], shares: Float[Tensor, "N M"]
) -> Float[Tensor, "M"]:
    """Computes `max_c w_c max_v p_c(v)`."""
    return (weights * best).amax(dim=0)


def _second(shifted: Float[Tensor, "C M"], exps: Float[Tensor, "C M"], total: Float[Tensor, "M"]) -> Float[Tensor, "M"]:
    """Computes the second largest `p_c(v)`; 0 in a chunk of one value."""
    largest = exps.max(dim=0).indices
    value = torch.arange(len(exps), device=exps.device).unsqueeze(1)
    return torch.where(value == largest, 0.0, exps).amax(dim=0) / total


def _join_second(
    weights: Float[Tensor, "N M"], best: Float[Tensor, "N M"], shares: Float[Tensor, "N M"]
) -> Float[Tensor, "M"]:
    """Computes the largest `w_c p_c(v)` minus the second largest; both are among the two largest of each chunk."""
    first, second = torch.cat([weights * best, weights * shares]).topk(2, dim=0).values
    return first - second


def _neg_entropy(
    shifted: Float[Tensor, "C M"], exps: Float[Tensor, "C M"], total: Float[Tensor, "M"]
) -> Float[Tensor, "M"]:
    """Computes `sum_v p_c(v) log p_c(v)`."""
    return (shifted * exps).sum(dim=0) / total - total.log()


def _join_neg_entropy(
    weights: Float[Tensor, "N M"], best: Float[Tensor, "N M"], shares: Float[Tensor, "N M"]
) -> Float[Tensor, "M"]:
    """Applies the chain rule: `sum_c w_c (log w_c + sum_v p_c(v) log p_c(v))`."""
    return (weights * shares - torch.special.entr(weights)).sum(dim=0)


STREAMED: dict[str, Streamed] = {
    "prob": Streamed(share=_best, join=_join_best),
    "margin": Streamed(share=_second, join=_join_second),
    "neg_entropy": Streamed(share=_neg_entropy, join=_join_neg_entropy),
}

# --- functions of a chunk's logits: one pass over them each, if compiled ---------------------------------------------


def _summarise(logits: Float[Tensor, "C M"], *confidences: str) -> Float[Tensor, "K M"]:
    """Computes the log-sum-exp, the largest probability, and each confidence's share."""
    # In bfloat16 a sum of a thousand exponentials would stop growing: it keeps 8 bits.
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
    """Computes `_summarise`, and the logit of the value `target`, or 0 if that is in another chunk."""
    of_target = torch.where(_is_target(logits, target), at_least_fp32(logits), 0.0).sum(dim=0)
    return torch.cat([_summarise(logits, confidence), of_target.unsqueeze(0)])


def _largest(scores: Float[Tensor, "C M"]) -> tuple[Float[Tensor, "M"], Int[Tensor, "M"]]:
    """Finds the largest score and its value, the lowest among equals."""
    # `max` with indices takes a CPU twice as long.
    best = scores.amax(dim=0)
    value = torch.arange(len(scores), device=scores.device).unsqueeze(1)
    return best, torch.where(scores == best, value, len(scores) - 1).amin(dim=0)


def _errors(
    logits: Float[Tensor, "C M"], target: Int[Tensor, "M"], log_total: Float[Tensor, "M"]
) -> Float[Tensor, "C M"]:
    """Computes `p - onehot(target)`."""
    # Subtracted before it is rounded: where p is close to 1, rounding first would leave nothing of 1 - p.
    p = (at_least_fp32(logits) - log_total).exp()
    return torch.where(_is_target(logits, target), p - 1, p).to(logits.dtype)


def _is_target(logits: Float[Tensor, "C M"], target: Int[Tensor, "M"]) -> Tensor:
    return torch.arange(len(logits), device=logits.device).unsqueeze(1) == target


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `function` once, for any number of positions and values."""
    # The number of positions changes with every step, that of values in the last chunk.
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
    """Computes `TokenStats.from_logits(hidden @ weight.T, x0)`, with a mask logit of -inf, in M x `chunk` of memory.

    The backward pass also leaves the gradient of `weight` in `tied`.
    """
    head = _Head(
        dtype=_product_dtype(hidden),
        mask_id=mask_id,
        chunk=chunk,
        confidence=confidence,
        is_compiled=is_compiled,
        tied=tied,
    )
    nll, scores, top1 = _statistics(hidden, weight, x0, head)
    return TokenStats(nll=nll, confidence=scores, top1=top1, statistic=confidence)


@torch.no_grad()
def prediction(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    query: Query,
    *,
    mask_id: int,
    chunk: int = CHUNK,
    is_compiled: bool = False,
) -> Prediction:
    """Computes `Prediction.from_logits(hidden @ weight.T)`, with a mask logit of -inf, in M x `chunk` of memory."""
    head = _Head(
        dtype=_product_dtype(hidden),
        mask_id=mask_id,
        forbidden=query.forbidden,
        chunk=chunk,
        confidence=query.confidence,
        is_compiled=is_compiled,
    )
    row = torch.arange(len(hidden), device=hidden.device)
    if query.draw is None:
        return _predict(hidden, weight, query, head, row)
    # So few positions at once would mostly read the head's weights; as many logits as weights take no more memory.
    size = max(len(hidden) * chunk, min(weight.numel(), _WHOLE)) // len(weight)
    parts = [vars(_predict(hidden, weight, query, head, some)) for some in row.split(max(1, size))]
    columns = {name: [part[name] for part in parts] for name in parts[0]}
    joined: dict[str, Any] = {name: None if own[0] is None else torch.cat(own) for name, own in columns.items()}
    return Prediction(**joined)


def _predict(
    hidden: Float[Tensor, "M D"], weight: Float[Tensor, "V D"], query: Query, head: "_Head", row: Int[Tensor, "m"]
) -> Prediction:
    """Computes the prediction at the positions `row` of the query; all their logits are in memory for a `draw`."""
    hidden = hidden[row]
    confidences = (query.confidence, "neg_entropy") if query.has_entropy else (query.confidence,)
    given = torch.full_like(row, head.mask_id) if query.given is None else query.given[row]
    whole = hidden.new_empty(len(row), len(weight), dtype=head.dtype) if query.draw is not None else None
    summaries, guesses, choices, of_given = [], [], [], []
    for part in head.chunks(hidden.to(head.dtype), weight, whole):
        summaries.append(head.run(_summarise, part.logits, *confidences))
        guesses.append(part.pick(head.run(_largest, part.logits)))
        of_given.append(part.logits_of(given))
        if query.perturb is not None:
            choices.append(part.pick(_largest(query.perturb(at_least_fp32(part.logits).T, row, part.tokens).T)))
    (confidence, *entropy), top1, log_total = _join_chunks(torch.stack(summaries, dim=1), *confidences)
    likeliest, logit = _first_of_largest(guesses)
    values = likeliest
    if choices:
        values, logit = _first_of_largest(choices)
    elif query.draw is not None and whole is not None:
        # A CPU is fastest where the numbers of a few positions stay in its cache, a GPU with all of them.
        size = len(row) if whole.is_cuda else _CACHED // len(weight)
        pieces = zip(whole.split(max(1, size)), row.split(max(1, size)), strict=True)
        values = torch.cat([query.draw(at_least_fp32(own), some) for own, some in pieces])
        logit = at_least_fp32(whole.gather(-1, values.unsqueeze(-1)).squeeze(-1))
    log_prob = torch.where(given == head.mask_id, logit, torch.stack(of_given).sum(dim=0)) - log_total
    return Prediction(
        likeliest=likeliest,
        values=torch.where(given == head.mask_id, values, given),
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
    """Computes `softmax(hidden @ weight.T) @ embedding`, with a mask logit of -inf, in M x `chunk` of memory."""
    head = _Head(dtype=_product_dtype(hidden), mask_id=mask_id, forbidden=forbidden, chunk=chunk, confidence="prob")
    total = at_least_fp32(hidden.new_zeros(len(hidden)))
    # An online softmax: sums are relative to the largest logit so far (Milakov and Gimelshein 2018, 1805.02867), and
    # shrink by `kept` when a larger one comes.
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
    """Returns the value and the logit of the largest of the chunks' largest scores, the first among equals."""
    scores, values, logits = (torch.stack(part) for part in zip(*found, strict=True))
    first = _largest(scores)[1].unsqueeze(0)
    return values.gather(0, first).squeeze(0), logits.gather(0, first).squeeze(0)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """Returns the format that `F.linear` would compute in."""
    # `torch.mm(out=)` is not autocast, so the head casts for itself; autocast leaves fp64 alone.
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """The logits and head weights of the vocabulary entries from `start` to `start + C`."""

    start: int
    weight: Float[Tensor, "C D"]
    logits: Float[Tensor, "C M"]

    @property
    def tokens(self) -> Int[Tensor, "C"]:
        return torch.arange(self.start, self.start + len(self.logits), device=self.logits.device)

    def pick(self, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Turns a score and its row in this chunk, from `_largest`, into the score, its value and its logit."""
        value = found[1] + self.start
        return found[0], value, self.logits_of(value)

    def logits_of(self, value: Int[Tensor, "M"]) -> Float[Tensor, "M"]:
        """Returns each position's logit of `value`; 0 if that is in another chunk, -inf if it is forbidden."""
        row = value - self.start
        is_here = (row >= 0) & (row < len(self.logits))
        logit = self.logits.gather(0, row.clamp(0, len(self.logits) - 1).unsqueeze(0)).squeeze(0)
        is_never = logit == torch.finfo(logit.dtype).min
        return at_least_fp32(torch.where(is_here, logit.masked_fill(is_never, -torch.inf), 0.0))


@dataclass(frozen=True, kw_only=True)
class _Head:
    """Settings and chunks that the forward and the backward pass share."""

    dtype: torch.dtype
    mask_id: int
    chunk: int
    confidence: str
    forbidden: Int[Tensor, "F"] | None = None
    is_compiled: bool = False
    tied: TiedGradient | None = None

    def chunks(
        self, hidden: Float[Tensor, "M D"], weight: Float[Tensor, "V D"], whole: Float[Tensor, "M V"] | None = None
    ) -> Iterator[_Chunk]:
        """Yields each chunk with its logits, which are in `whole`; without one, the next chunk overwrites them."""
        # One piece of memory for all: the system would map a fresh one for each chunk page by page.
        memory = hidden.new_empty(0 if whole is not None else min(self.chunk, len(weight)), len(hidden))
        for start in range(0, len(weight), self.chunk):
            part = weight[start : start + self.chunk].to(self.dtype)
            if whole is not None:
                memory = whole[:, start : start + len(part)].T
            logits = memory[: len(part)]
            torch.mm(part, hidden.T, out=logits)
            if start <= self.mask_id < start + len(part):
                # Not -inf: a chunk that holds the mask token alone would become NaN (-inf minus -inf).
                logits[self.mask_id - start] = torch.finfo(logits.dtype).min
            chunk = _Chunk(start=start, weight=part, logits=logits)
            if self.forbidden is not None:
                is_never = torch.isin(chunk.tokens, self.forbidden).unsqueeze(1)
                logits.masked_fill_(is_never, torch.finfo(logits.dtype).min)
            yield chunk

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return (_compiled(function) if self.is_compiled else function)(*arguments)


def _join_chunks(summaries: Float[Tensor, "K N M"], *confidences: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """Computes confidences, largest probability and log-sum-exp, each (M,), from those of the chunks."""
    log_totals, best, *shares = summaries
    log_total = log_totals.logsumexp(dim=0)
    weights = (log_totals - log_total).exp()
    joined = [STREAMED[name].join(weights, best, share) for name, share in zip(confidences, shares, strict=True)]
    return joined, _join_best(weights, best, best), log_total


class _Statistics(torch.autograd.Function):
    """`(hidden, weight, x0) -> (nll, confidence, top1)`; only `nll` has a gradient.

    With `p = softmax(hidden @ weight.T)`, `error = p - onehot(x0)`, and g the gradient of the loss by `nll`:
    `d_hidden = g * (error @ weight)` and `d_weight = error.T @ (g * hidden)`. The backward pass computes the logits
    again. Chunks are cut from the vocabulary, not from the positions, so that each writes its own rows of `d_weight`
    once; all of them add to `d_hidden`, which is smaller.
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
        (confidence,), top1, log_total = _join_chunks(torch.stack(shares), head.confidence)
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
        scaled = (hidden * g).to(head.dtype)  # M x D products; scaling the errors instead would take V x M
        # Accumulated in fp32: every chunk adds to it.
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


# A compiler would unroll the chunks: thousands of operations for a vocabulary of 150 000. It breaks the graph here.
_statistics: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.compiler.disable(_Statistics.apply, recursive=False)
