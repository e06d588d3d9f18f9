"""Multi-head self-attention with rotary positions.

Dimensions: B rows, L positions, M positions asked for, D width, H heads, G key-value heads, E width of a head, P = E / 2
pairs of channels, J = H + 2 G.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.types import at_least_fp32

Heads = Float[Tensor, "B H L E"]


def sdpa(q: Heads, k: Heads, v: Heads, dropout: float) -> Heads:
    """PyTorch's fused kernel."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def matmul(q: Heads, k: Heads, v: Heads, dropout: float) -> Heads:
    """`softmax(q k^T / sqrt(E)) v`, written out; the softmax in fp32 at least."""
    scores = at_least_fp32(q @ k.mT) * q.shape[-1] ** -0.5
    return F.dropout(scores.softmax(dim=-1).to(v.dtype), dropout) @ v


BACKENDS: dict[str, Callable[[Heads, Heads, Heads, float], Heads]] = {"sdpa": sdpa, "matmul": matmul}

_LONGEST_MATMUL = 192


def fastest(*, device: str, dtype: torch.dtype, length: int, with_gradient: bool) -> str:
    """The backend that measured fastest: a fixed rule, so that a run does not depend on how busy its machine was.

    The fused kernel wins but in one case: on CPUs its backward pass in bfloat16 takes several times as long as plain
    products at Sudoku's lengths (4.2 times at L = 81, 2.0 at 162, 0.6 at 256; docs/LOG.md).
    """
    is_slow = device == "cpu" and dtype == torch.bfloat16 and with_gradient and length <= _LONGEST_MATMUL
    return "matmul" if is_slow else "sdpa"


def rotate(x: Heads, cos: Float[Tensor, "L P"], sin: Float[Tensor, "L P"]) -> Heads:
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
    """Full (bidirectional) attention; `num_kv_heads` < `num_heads` shares keys and values among groups of heads.

    `backend` is a key of `BACKENDS`, or `auto`: the fastest.
    """

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, *, qkv_bias: bool, dropout: float, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.backend = backend
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = dim // num_heads
        self.dropout = dropout
        self.q = nn.Linear(dim, num_heads * self.head_dim, bias=qkv_bias)
        self.k = nn.Linear(dim, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.v = nn.Linear(dim, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.out = nn.Linear(num_heads * self.head_dim, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        angles: tuple[Float[Tensor, "L P"], Float[Tensor, "L P"]] | None,
        at: Int[Tensor, "M"] | None = None,
    ) -> Float[Tensor, "B L D"] | Float[Tensor, "M D"]:
        """Every position attends to all; `at`: only these flat positions are asked for."""
        q, k, v = self._project(x)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        groups = self.num_heads // self.num_kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        mixed = BACKENDS[self._backend_for(q)](q, k, v, self.dropout if self.training else 0.0)
        return self.out(rows_at(mixed.transpose(1, 2).flatten(2), at))

    def _project(
        self, x: Float[Tensor, "B L D"]
    ) -> tuple[Heads, Float[Tensor, "B G L E"], Float[Tensor, "B G L E"]]:
        """Queries, keys and values from one product: it is faster than three narrow ones, and so is its backward."""
        weight = torch.cat([self.q.weight, self.k.weight, self.v.weight])
        bias = None if self.q.bias is None else torch.cat([self.q.bias, self.k.bias, self.v.bias])
        heads: Float[Tensor, "B J L E"] = F.linear(x, weight, bias).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return q, k, v

    def _backend_for(self, q: Heads) -> str:
        if self.backend != "auto":
            return self.backend
        return fastest(device=q.device.type, dtype=q.dtype, length=q.shape[2], with_gradient=q.requires_grad)


def rows_at(x: Float[Tensor, "B L D"], at: Int[Tensor, "M"] | None) -> Float[Tensor, "B L D"] | Float[Tensor, "M D"]:
    """The vectors at the flat positions `at`; all of them where that is None."""
    return x if at is None else x.flatten(0, 1).index_select(0, at)
