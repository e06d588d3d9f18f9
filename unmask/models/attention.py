"""Multi-head self-attention with rotary positions.

Dimensions: B rows, L positions, D width, H heads, G key-value heads, E width of a head, P = E / 2 pairs of channels.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def rotate(
    x: Float[Tensor, "B H L E"], cos: Float[Tensor, "L P"], sin: Float[Tensor, "L P"]
) -> Float[Tensor, "B H L E"]:
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
    """Full (bidirectional) attention; `num_kv_heads` < `num_heads` shares keys and values among groups of heads."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, *, qkv_bias: bool, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = dim // num_heads
        self.dropout = dropout
        self.q = nn.Linear(dim, num_heads * self.head_dim, bias=qkv_bias)
        self.k = nn.Linear(dim, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.v = nn.Linear(dim, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.out = nn.Linear(num_heads * self.head_dim, dim, bias=False)

    def forward(
        self, x: Float[Tensor, "B L D"], angles: tuple[Float[Tensor, "L P"], Float[Tensor, "L P"]] | None
    ) -> Float[Tensor, "B L D"]:
        q, k, v = self._heads(self.q(x)), self._heads(self.k(x)), self._heads(self.v(x))
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        groups = self.num_heads // self.num_kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Float[Tensor, "B L HE"]) -> Float[Tensor, "B H L E"]:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
