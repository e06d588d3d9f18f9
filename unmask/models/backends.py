"""Ways to compute attention, and which of them is likely the fastest.

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
    """PyTorch's fused kernel; once for each block, where there are some."""
    if seen.is_causal:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    return seen.by_block(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=dropout), q, k, v)


def matmul(q: Heads, k: Heads, v: Heads, dropout: float, seen: AttentionPattern = EVERYTHING) -> Heads:
    """`softmax(q k^T / sqrt(E)) v`, written out; exponents and sums in fp32 at least.

    The sum divides the product rather than its W x W factor: less to compute.
    """
    if not (seen.is_causal or seen.is_full(q.shape[2])):
        return block_attention(q, k, v, dropout, seen)
    scores = at_least_fp32((q * q.shape[-1] ** -0.5) @ k.mT)
    if seen.is_causal:
        position = torch.arange(q.shape[2], device=q.device)
        scores = scores.masked_fill(position > position.unsqueeze(1), -torch.inf)
    exps = _ROUNDED_EXP(scores - scores.amax(dim=-1, keepdim=True).detach(), v.dtype)
    total = exps.sum(dim=-1, keepdim=True, dtype=scores.dtype)
    return (F.dropout(exps, dropout) @ v / total).to(v.dtype)


class _RoundedExp(torch.autograd.Function):
    """`exp(x)` in the format `dtype`. The backward pass is left with these rounded W x W values, and no others."""

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
    """FlexAttention, for GPUs, where it is compiled: on CPUs it has no backward pass. Knows no dropout."""
    from torch.nn.attention.flex_attention import flex_attention  # here, as it takes a second to import

    if q.device.type == "cpu" and q.requires_grad:
        raise UserError("model.attention=flex cannot be trained on a CPU; use auto, sdpa or matmul")
    width = q.shape[2]
    mask = None if seen.is_full(width) else _block_mask(seen, width, q.device)
    return flex_attention(q, k, v, block_mask=mask)  # a tensor: nothing else is asked for


@cache
def _block_mask(seen: AttentionPattern, width: int, device: torch.device) -> Any:
    """FlexAttention's mask of what is seen among `width` positions: made once."""
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
    """The backend that is likely the fastest where none was measured: a rule from measurements.

    The fused kernel wins but in one case: on CPUs its backward pass in bfloat16 takes several times as long as plain
    products at Sudoku's lengths (4.2 times at L = 81, 2.0 at 162, 0.6 at 256; docs/LOG.md).
    """
    is_slow = device == "cpu" and dtype == torch.bfloat16 and with_gradient and length <= _LONGEST_MATMUL
    return "matmul" if is_slow else "sdpa"


FEW_BLOCKS = 4
"""The fused kernel is called for every block and layer: a compiler takes seconds for each of the calls."""


def fastest_by_block(*, device: str, dtype: torch.dtype, num_blocks: int, with_gradient: bool, can_flex: bool) -> str:
    """As `fastest`, where positions see blocks.

    On CPUs, with a gradient, the fused kernel is the faster one for few blocks in fp32 alone: its backward pass is slow
    for the few queries of a block (at L = 256 in bfloat16 2 times at 2 blocks, 3 times at 16).
    """
    if not with_gradient:
        return "sdpa"
    if device == "cpu":
        return "sdpa" if num_blocks <= FEW_BLOCKS and dtype != torch.bfloat16 else "matmul"
    return "flex" if can_flex else "sdpa"
