"""Multi-head self-attention with rotary positions, among all positions or causal.

Dimensions: B rows, L positions, M positions asked for, D width, H heads, G key-value heads, J = H + 2 G, E width of a
head, P = E / 2 pairs of channels; n positions that follow those of a cache, W positions known by then.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.errors import UserError
from unmask.models.cache import LayerCache
from unmask.types import at_least_fp32

Heads = Float[Tensor, "B H L E"]


def sdpa(q: Heads, k: Heads, v: Heads, dropout: float, is_causal: bool = False) -> Heads:
    """PyTorch's fused kernel."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal)


def matmul(q: Heads, k: Heads, v: Heads, dropout: float, is_causal: bool = False) -> Heads:
    """`softmax(q k^T / sqrt(E)) v`, written out; exponents and sums in fp32 at least.

    The sum divides the product rather than its L x L factor: less to compute.
    """
    scores = at_least_fp32((q * q.shape[-1] ** -0.5) @ k.mT)
    if is_causal:
        position = torch.arange(q.shape[2], device=q.device)
        scores = scores.masked_fill(position > position.unsqueeze(1), -torch.inf)
    exps = _ROUNDED_EXP(scores - scores.amax(dim=-1, keepdim=True).detach(), v.dtype)
    total = exps.sum(dim=-1, keepdim=True, dtype=scores.dtype)
    return (F.dropout(exps, dropout) @ v / total).to(v.dtype)


class _RoundedExp(torch.autograd.Function):
    """`exp(x)` in the format `dtype`. The backward pass is left with these rounded L x L values, and no others."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "B H L L2"], dtype: torch.dtype) -> Float[Tensor, "B H L L2"]:
        exps = x.exp().to(dtype)
        ctx.save_for_backward(exps)
        ctx.dtype = x.dtype
        return exps

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "B H L L2"]) -> tuple[Float[Tensor, "B H L L2"], None]:
        (exps,) = ctx.saved_tensors
        return grad.to(ctx.dtype) * exps, None


_ROUNDED_EXP: Callable[[Tensor, torch.dtype], Tensor] = _RoundedExp.apply


def flex(q: Heads, k: Heads, v: Heads, dropout: float, is_causal: bool = False) -> Heads:
    """FlexAttention, for GPUs, where it is compiled: on CPUs it has no backward pass. Knows no dropout."""
    from torch.nn.attention.flex_attention import flex_attention  # here, as it takes a second to import

    if q.device.type == "cpu" and q.requires_grad:
        raise UserError("model.attention=flex cannot be trained on a CPU; use auto, sdpa or matmul")
    mask = _causal_blocks(q.shape[2], q.device) if is_causal else None
    return flex_attention(q, k, v, block_mask=mask)  # a tensor: nothing else is asked for


@cache
def _causal_blocks(length: int, device: torch.device) -> Any:
    """FlexAttention's mask of what is not in the future: made once for a length."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda row, head, query, key: query >= key, None, None, length, length, device=device)


BACKENDS: dict[str, Callable[[Heads, Heads, Heads, float, bool], Heads]] = {
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


def train_with(model: nn.Module, backend: str | None) -> None:
    """Has every attention of `model` that may choose use `backend` where there are gradients."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.training_backend = backend


def rotate(x: Heads, cos: Float[Tensor, "*rows L P"], sin: Float[Tensor, "*rows L P"]) -> Heads:
    """Rotates the channel pairs (e, e + E/2) by the position's angles: the half-split layout of Llama and Qwen.

    Each pair turns by one angle, so that a product of rotated queries and keys depends on their distance alone
    (Su et al. 2021, 2104.09864).
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotary_angles(length: int, head_dim: int, theta: float) -> tuple[Float[Tensor, "L P"], Float[Tensor, "L P"]]:
    """cos and sin of `position * theta^(-2 e / E)`, for e in 0 .. E/2 - 1."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


class Attention(nn.Module):
    """Attention among all positions, or with `is_causal` to those up to one's own.

    `num_kv_heads` < `num_heads` shares keys and values among groups of heads.

    `backend` is a key of `BACKENDS`, or `auto`: with gradients `training_backend` if that was set (`train_with`), else
    what `fastest` says. `qk_norm_eps`: every query and key is an RMSNorm's output, over the head's width (Qwen3).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        qkv_bias: bool,
        dropout: float,
        backend: str = "auto",
        is_causal: bool = False,
        head_dim: int | None = None,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.is_causal = is_causal
        self.training_backend: str | None = None
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = head_dim or dim // num_heads
        self.dropout = dropout
        self.q = nn.Linear(dim, num_heads * self.head_dim, bias=qkv_bias)
        self.k = nn.Linear(dim, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.v = nn.Linear(dim, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.out = nn.Linear(num_heads * self.head_dim, dim, bias=False)
        self.q_norm, self.k_norm = (
            nn.Identity() if qk_norm_eps is None else nn.RMSNorm(self.head_dim, eps=qk_norm_eps) for _ in range(2)
        )

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        angles: tuple[Float[Tensor, "L P"], Float[Tensor, "L P"]] | None,
        at: Int[Tensor, "M"] | None = None,
    ) -> Float[Tensor, "B L D"] | Float[Tensor, "M D"]:
        """`at`: only these flat positions are asked for."""
        q, k, v = self._project(x)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        groups = self.num_heads // self.num_kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        mixed = BACKENDS[self._backend_for(q)](q, k, v, self.dropout if self.training else 0.0, self.is_causal)
        return self.out(rows_at(mixed.transpose(1, 2).flatten(2), at))

    def extend(
        self,
        x: Float[Tensor, "B n D"],
        angles: tuple[Float[Tensor, "B 1 n P"], Float[Tensor, "B 1 n P"]] | None,
        position: Int[Tensor, "B n"],
        known: LayerCache,
    ) -> Float[Tensor, "B n D"]:
        """Causal attention of the vectors at `position` to what is `known`, and to each other, which is known then."""
        q, k, v = self._project(x)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        keys, values = known.write(k, v, position)
        is_visible = torch.arange(keys.shape[2], device=x.device) <= position.unsqueeze(-1)
        is_shared = self.num_heads > self.num_kv_heads
        mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=is_visible.unsqueeze(1), enable_gqa=is_shared)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _project(self, x: Float[Tensor, "B L D"]) -> tuple[Heads, Float[Tensor, "B G L E"], Float[Tensor, "B G L E"]]:
        """Queries, keys and values from one product: it is faster than three narrow ones, and so is its backward."""
        weight = torch.cat([self.q.weight, self.k.weight, self.v.weight])
        bias = None if self.q.bias is None else torch.cat([self.q.bias, self.k.bias, self.v.bias])
        heads: Float[Tensor, "B J L E"] = F.linear(x, weight, bias).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return _normalised(self.q_norm, q), _normalised(self.k_norm, k), v

    def _backend_for(self, q: Heads) -> str:
        if self.backend != "auto":
            return self.backend
        if self.training_backend is not None and q.requires_grad:
            return self.training_backend
        return fastest(device=q.device.type, dtype=q.dtype, length=q.shape[2], with_gradient=q.requires_grad)


def _normalised(norm: nn.Module, x: Float[Tensor, "B H L E"]) -> Float[Tensor, "B H L E"]:
    """`norm(x)`, computed in fp32 at least: under autocast x is rounded, and the norm's weights are not."""
    return x if isinstance(norm, nn.Identity) else norm(at_least_fp32(x)).to(x.dtype)


def rows_at(x: Float[Tensor, "B L D"], at: Int[Tensor, "M"] | None) -> Float[Tensor, "B L D"] | Float[Tensor, "M D"]:
    """The vectors at the flat positions `at`; all of them where that is None."""
    return x if at is None else x.flatten(0, 1).index_select(0, at)
