"""Block attention in plain products, as one custom operation, which compiles in constant time for any number of blocks.

Noisy block b sees [clean blocks < b ; noisy block b], clean block b sees [clean blocks < b ; clean block b]. Both are
computed together, as rows of one batch, and what they see is a slice of one tensor: the keys of the noisy rows start as
the noisy ones, and are overwritten by the clean ones block by block. The backward pass computes the weights again, from
the log-sum-exp.

Dimensions: B rows, R = 2 B rows (B with one stream), H heads, E width of a head; W positions of all streams, L of one;
S positions of a block, which r of R rows have, and T positions that it sees.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmask.models.visibility import AttentionPattern, Heads
from unmask.types import at_least_fp32

Stacked = Float[Tensor, "R H L E"]
Weights = Float[Tensor, "r H S T"]


def block_attention(q: Heads, k: Heads, v: Heads, dropout: float, seen: AttentionPattern) -> Heads:
    """Computes `softmax(q k^T / sqrt(E)) v` over what each position sees; exponents and sums in fp32 at least."""
    # A seed, not a mask, goes to the backward pass, which draws the same dropout again.
    seed = torch.randint(2**62, (1,), device=q.device) if dropout else None
    mixed, _ = _attend(q, k, v, seen.size, seen.noisy, dropout, seed)
    return mixed


@dataclass(frozen=True)
class _Streams:
    """The layout of W positions of B rows as R rows of L positions: the noisy stream above the clean one."""

    rows: int
    width: int
    size: int
    noisy: int

    @property
    def length(self) -> int:
        return self.noisy or self.width

    def stack(self, x: Heads) -> Stacked:
        """Stacks the streams, in new memory if there are two. The last clean block, which `x` lacks, is 0."""
        if not self.noisy:
            return x.contiguous()
        stacked = x.new_zeros(2 * self.rows, x.shape[1], self.length, x.shape[3])
        stacked[: self.rows] = x[:, :, : self.noisy]
        stacked[self.rows :, :, : self.width - self.noisy] = x[:, :, self.noisy :]
        return stacked

    def unstack(self, x: Stacked) -> Heads:
        """Undoes `stack`."""
        return torch.cat([x[: self.rows], x[self.rows :, :, : self.width - self.noisy]], dim=2) if self.noisy else x

    def blocks(self) -> Iterator[tuple[slice, int, int]]:
        """Yields the rows that have each block, and its bounds. The last block has no clean rows: no one sees it."""
        for start in range(0, self.length, self.size):
            end = min(start + self.size, self.length)
            yield slice(0, self.rows if end == self.length else None), start, end

    def show_clean(self, x: Stacked, start: int, end: int) -> None:
        """Overwrites a block of the noisy rows with the clean one, which is what all later noisy blocks see."""
        if self.noisy:
            x[: self.rows, :, start:end] = x[self.rows :, :, start:end]

    def add(self, total: Stacked, part: Float[Tensor, "r H T E"], start: int, end: int) -> None:
        """Adds a block's gradients of keys or values to `total`."""
        # All that a noisy row sees is clean, except its own block: only that part belongs to the noisy stream, and no
        # other block sees it, so it is assigned.
        if not self.noisy:
            total[:, :, :end] += part
            return
        total[: self.rows, :, start:end] = part[: self.rows, :, start:]
        total[self.rows :, :, :start] += part[: self.rows, :, :start]
        if len(part) > self.rows:
            total[self.rows :, :, :end] += part[self.rows :]


def _make_dropout(share: float, seed: Int[Tensor, "1"] | None) -> Callable[[Weights], Weights]:
    """Returns the dropout function of one pass; None: no dropout."""
    # Draws depend on the seed and the order of the blocks alone, so the backward pass drops the same weights.
    if seed is None:
        return lambda weights: weights
    generator = torch.Generator(seed.device).manual_seed(int(seed))
    return lambda weights: weights * torch.empty_like(weights).bernoulli_(1 - share, generator=generator) / (1 - share)


def _scores(q: Float[Tensor, "r H S E"], k: Float[Tensor, "r H T E"]) -> Weights:
    return at_least_fp32((q * q.shape[-1] ** -0.5) @ k.mT)


@torch.library.custom_op(
    "unmask::attend_by_blocks",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, int size, int noisy, float dropout, Tensor? seed) -> (Tensor, Tensor)",
)
def _attend(
    q: Heads, k: Heads, v: Heads, size: int, noisy: int, dropout: float, seed: Int[Tensor, "1"] | None
) -> tuple[Heads, Float[Tensor, "R H L"]]:
    """Returns the mixed values, and the log-sum-exp of every query's scores."""
    streams, drop = _Streams(len(q), q.shape[2], size, noisy), _make_dropout(dropout, seed)
    queries, keys, values = (streams.stack(x) for x in (q, k, v))
    mixed = torch.empty_like(queries)
    log_total = at_least_fp32(mixed.new_zeros(mixed.shape[:3]))
    for rows, start, end in streams.blocks():
        scores = _scores(queries[rows, :, start:end], keys[rows, :, :end])
        largest = scores.amax(dim=-1, keepdim=True)
        exps = scores.sub_(largest).exp_()
        total = exps.sum(dim=-1, keepdim=True)
        mixed[rows, :, start:end] = drop(exps).to(v.dtype) @ values[rows, :, :end] / total
        log_total[rows, :, start:end] = (largest + total.log()).squeeze(-1)
        streams.show_clean(keys, start, end)
        streams.show_clean(values, start, end)
    return streams.unstack(mixed), log_total


@torch.library.custom_op(
    "unmask::attend_by_blocks_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor mixed, Tensor log_total, int size, int noisy, "
    "float dropout, Tensor? seed) -> (Tensor, Tensor, Tensor)",
)
def _attend_backward(
    grad: Heads,
    q: Heads,
    k: Heads,
    v: Heads,
    mixed: Heads,
    log_total: Float[Tensor, "R H L"],
    size: int,
    noisy: int,
    dropout: float,
    seed: Int[Tensor, "1"] | None,
) -> tuple[Heads, Heads, Heads]:
    """Computes the gradients: with weights p, `d_v = p^T grad` and `d_score = p (grad v^T - sum(grad mixed))`."""
    streams, drop = _Streams(len(q), q.shape[2], size, noisy), _make_dropout(dropout, seed)
    queries, keys, values, grads = (streams.stack(x) for x in (q, k, v, grad))
    shift = streams.stack((at_least_fp32(grad) * mixed).sum(dim=-1, keepdim=True))
    d_q, d_k, d_v = (torch.zeros_like(x) for x in (queries, keys, values))
    scale = q.shape[-1] ** -0.5
    for rows, start, end in streams.blocks():
        q_own, k_seen = queries[rows, :, start:end], keys[rows, :, :end]
        g, lse = grads[rows, :, start:end], log_total[rows, :, start:end]
        weights = _scores(q_own, k_seen).sub_(lse.unsqueeze(-1)).exp_()
        dropped = drop(weights)
        streams.add(d_v, dropped.to(g.dtype).mT @ g, start, end)
        d_scores = at_least_fp32(g @ values[rows, :, :end].mT).mul_(dropped)
        d_scores = d_scores.addcmul_(weights, shift[rows, :, start:end], value=-1).to(q.dtype)
        d_q[rows, :, start:end] = d_scores @ k_seen * scale
        streams.add(d_k, d_scores.mT @ (q_own * scale), start, end)
        streams.show_clean(keys, start, end)
        streams.show_clean(values, start, end)
    return streams.unstack(d_q), streams.unstack(d_k), streams.unstack(d_v)


@_attend.register_fake
def _shapes(
    q: Tensor, k: Tensor, v: Tensor, size: int, noisy: int, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows = len(q) * (2 if noisy else 1)
    log_total = q.new_empty(rows, q.shape[1], noisy or q.shape[2], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), log_total


@_attend_backward.register_fake
def _shapes_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.settings, seed = inputs
    ctx.save_for_backward(q, k, v, *output, seed)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    return (*_attend_backward(grad, *tensors, *ctx.settings, seed), None, None, None, None)


_attend.register_autograd(_differentiate, setup_context=_save_context)
