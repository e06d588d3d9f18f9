"""Implementations of attention, and rules for choosing the fastest.

Dimensions: B rows, W positions, H heads, E width of a head.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from unmask.errors import UserError
from unmask.models.tiles import block_attention
from unmask.models.visibility import EVERYTHING, AttentionPattern, Heads
from unmask.types import at_least_fp32


def sdpa(q: Heads, k: Heads, v: Heads, dropout: float, seen: AttentionPattern = EVERYTHING) -> Heads:
    """Calls PyTorch's fused kernel; with blocks, once for each of them."""
    if seen.is_causal:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    return seen.by_block(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=dropout), q, k, v)


def matmul(q: Heads, k: Heads, v: Heads, dropout: float, seen: AttentionPattern = EVERYTHING) -> Heads:
    """Computes `softmax(q k^T / sqrt(E)) v` in plain products; exponents and sums in fp32 at least."""
    if not (seen.is_causal or seen.is_full(q.shape[2])):
        return block_attention(q, k, v, dropout, seen)
    scores = at_least_fp32((q * q.shape[-1] ** -0.5) @ k.mT)
    if seen.is_causal:
        position = torch.arange(q.shape[2], device=q.device)
        scores = scores.masked_fill(position > position.unsqueeze(1), -torch.inf)
    exps = _ROUNDED_EXP(scores - scores.amax(dim=-1, keepdim=True).detach(), v.dtype)
    total = exps.sum(dim=-1, keepdim=True, dtype=scores.dtype)
    # The sum divides the product (W x E) rather than its factor (W x W): less to compute.
    return (F.dropout(exps, dropout) @ v / total).to(v.dtype)


class _RoundedExp(torch.autograd.Function):
    """`exp(x)` rounded to `dtype`, which is all that is kept for the backward pass: no W x W values in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "B H W W2"], dtype: torch.dtype) -> Float[Tensor, "B H W W2"]:
        exps = x.exp().to(dtype)
        ctx.save_for_backward(exps)
        ctx.dtype = x.dtype
        return exps

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "B H W W2"]) -> tuple[Float[Tensor, "B H W W2"], None]:
        (exps,) = ctx.saved_tensors
        return grad.to(ctx.dtype) * exps, None


_ROUNDED_EXP: Callable[[Tensor, torch.dtype], Tensor] = _RoundedExp.apply


def flex(q: Heads, k: Heads, v: Heads, dropout: float, seen: AttentionPattern = EVERYTHING) -> Heads:
    """Calls FlexAttention: for compiled code on GPUs, without dropout. On CPUs it has no backward pass."""
    from torch.nn.attention.flex_attention import flex_attention  # takes a second to import

    if q.device.type == "cpu" and q.requires_grad:
        raise UserError("model.attention=flex cannot be trained on a CPU; use auto, sdpa or matmul")
    width = q.shape[2]
    mask = None if seen.is_full(width) else _block_mask(seen, width, q.device)
    return flex_attention(q, k, v, block_mask=mask)


@cache
def _block_mask(seen: AttentionPattern, width: int, device: torch.device) -> Any:
    """Makes FlexAttention's mask of `width` positions, once for each pattern."""
    from torch.nn.attention.flex_attention import create_block_mask

    sees = seen.rule()
    return create_block_mask(lambda row, head, query, key: sees(query, key), None, None, width, width, device=device)


BACKENDS: dict[str, Callable[[Heads, Heads, Heads, float, AttentionPattern], Heads]] = {
    "sdpa": sdpa,
    "matmul": matmul,
    "flex": flex,
}

_LONGEST_MATMUL = 192


def fastest(*, device: str, dtype: torch.dtype, length: int, with_gradient: bool) -> str:
    """Returns the backend that is likely the fastest, by a rule from measurements.

    The fused kernel wins but in one case: on CPUs its backward pass in bfloat16 takes several times as long as plain
    products at Sudoku's lengths (4.2 times at L = 81, 2.0 at 162, 0.6 at 256; docs/LOG.md).
    """
    is_slow = device == "cpu" and dtype == torch.bfloat16 and with_gradient and length <= _LONGEST_MATMUL
    return "matmul" if is_slow else "sdpa"


FEW_BLOCKS = 4
"""Most blocks for the fused kernel on CPUs: it is called for every block, and each call takes seconds to compile."""


def fastest_by_block(*, device: str, dtype: torch.dtype, num_blocks: int, with_gradient: bool, can_flex: bool) -> str:
    """Returns the backend that is likely the fastest for block attention.

    On CPUs, with a gradient, the fused kernel is the faster one for few blocks in fp32 alone: its backward pass is slow
    for the few queries of a block (at L = 256 in bfloat16 2 times at 2 blocks, 3 times at 16).
    """
    if not with_gradient:
        return "sdpa"
    if device == "cpu":
        return "sdpa" if num_blocks <= FEW_BLOCKS and dtype != torch.bfloat16 else "matmul"
    return "flex" if can_flex else "sdpa"
