"""Multi-head self-attention with rotary positions: among all positions, causal, or block by block.

Dimensions: B rows, L positions, M positions asked for, D width, H heads, G key-value heads, J = H + 2 G, E width of a
head, P = E / 2 pairs of channels; n positions that are read beside those of a cache.

The norm of transformers.

What a transformer remembers of the positions that it has read.

Dimensions: B rows, b of them that are read, G key-value heads, L positions of a canvas, E width of a head, n positions
written, W known.
"""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.models.backends import BACKENDS, fastest, fastest_by_block
from unmask.models.visibility import EVERYTHING, AttentionPattern, Heads
from unmask.types import at_least_fp32


class RmsNorm(nn.RMSNorm):
    """`x / rms(x) * weight`, in the precision of x, whatever the weights have travelled in (`training/parallel.py`)."""

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


@dataclass
class KeyValueCache:
    """Keys and values of every layer, for canvases of `length` positions.

    The first `width` may be seen: all that any row has read lies there. `num_rows`: as many as are read first, if None.
    """

    length: int
    width: int = 0
    num_rows: int | None = None
    layers: dict[int, "LayerCache"] = field(default_factory=dict)

    def layer(self, number: int) -> "LayerCache":
        return self.layers.setdefault(number, LayerCache(self))

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        """Forgets all rows but these."""
        self.num_rows = len(rows)
        for layer in self.layers.values():
            layer.keys, layer.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)


@dataclass
class LayerCache:
    """Of one layer. What a row has not read yet holds anything: nobody attends to it before it is written."""

    whole: KeyValueCache
    keys: Float[Tensor, "B G L E"] = field(default_factory=lambda: torch.empty(0))
    values: Float[Tensor, "B G L E"] = field(default_factory=lambda: torch.empty(0))

    def write(
        self,
        k: Float[Tensor, "b G n E"],
        v: Float[Tensor, "b G n E"],
        position: Int[Tensor, "b n"],
        rows: Int[Tensor, "b"] | None = None,
    ) -> tuple[Float[Tensor, "b G W E"], Float[Tensor, "b G W E"]]:
        """Takes in what was read at `position` of these rows (None: of all); returns all that is known of them."""
        if self.keys.numel() == 0:
            shape = (self.whole.num_rows or len(k), k.shape[1], self.whole.length, k.shape[3])
            self.keys, self.values = k.new_zeros(shape), v.new_zeros(shape)
        width = self.whole.width
        if rows is not None:
            index = (rows.unsqueeze(1), slice(None), position)
            self.keys[index], self.values[index] = k.transpose(1, 2), v.transpose(1, 2)
            return self.keys[rows, :, :width], self.values[rows, :, :width]
        index_of_all = position[:, None, :, None].expand_as(k)
        self.keys.scatter_(2, index_of_all, k)
        self.values.scatter_(2, index_of_all, v)
        return self.keys[:, :, :width], self.values[:, :, :width]


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
    """Attention to what is `seen` in one stream, or in two.

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
        seen: AttentionPattern = EVERYTHING,
        head_dim: int | None = None,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.seen = seen
        self.training_backend: str | None = None
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = head_dim or dim // num_heads
        self.dropout = dropout
        self.q = nn.Linear(dim, num_heads * self.head_dim, bias=qkv_bias)
        self.k = nn.Linear(dim, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.v = nn.Linear(dim, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.out = nn.Linear(num_heads * self.head_dim, dim, bias=False)
        self.q_norm, self.k_norm = (
            nn.Identity() if qk_norm_eps is None else RmsNorm(self.head_dim, eps=qk_norm_eps) for _ in range(2)
        )

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        angles: tuple[Float[Tensor, "L P"], Float[Tensor, "L P"]] | None,
        at: Int[Tensor, "M"] | None = None,
        noisy: int = 0,
    ) -> Float[Tensor, "B L D"] | Float[Tensor, "M D"]:
        """`at`: only these flat positions are asked for. `noisy`: that many of L are noisy (`AttentionPattern`)."""
        q, k, v = self._project(x)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        groups = self.num_heads // self.num_kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        seen = replace(self.seen, noisy=noisy)
        mixed = BACKENDS[self._backend_for(q, seen)](q, k, v, self.dropout if self.training else 0.0, seen)
        return self.out(rows_at(mixed.transpose(1, 2).flatten(2), at))

    def extend(
        self,
        x: Float[Tensor, "B n D"],
        angles: tuple[Float[Tensor, "B 1 n P"], Float[Tensor, "B 1 n P"]] | None,
        position: Int[Tensor, "B n"],
        known: LayerCache,
        rows: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B n D"]:
        """Attention of the vectors at `position` to what is `known` of these rows, which takes them in first."""
        q, k, v = self._project(x)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        keys, values = known.write(k, v, position, rows)
        mask = None
        if self.seen.size is not None:
            place = torch.arange(keys.shape[2], device=x.device)
            mask = (place < self.seen.visible_until(position).unsqueeze(-1)).unsqueeze(1)
        is_shared = self.num_heads > self.num_kv_heads
        mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=is_shared)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _project(self, x: Float[Tensor, "B L D"]) -> tuple[Heads, Float[Tensor, "B G L E"], Float[Tensor, "B G L E"]]:
        """Queries, keys and values from one product: it is faster than three narrow ones, and so is its backward."""
        weight = torch.cat([self.q.weight, self.k.weight, self.v.weight])
        bias = None if self.q.bias is None else torch.cat([self.q.bias, self.k.bias, self.v.bias])
        heads: Float[Tensor, "B J L E"] = F.linear(x, weight, bias).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return _normalised(self.q_norm, q), _normalised(self.k_norm, k), v

    def _backend_for(self, q: Heads, seen: AttentionPattern) -> str:
        if self.backend != "auto":
            return self.backend
        if self.training_backend is not None and q.requires_grad:
            return self.training_backend
        length, device = q.shape[2], q.device.type
        if seen.is_causal or seen.is_full(length):
            return fastest(device=device, dtype=q.dtype, length=length, with_gradient=q.requires_grad)
        can_flex = torch.compiler.is_compiling() and not self.dropout and q.dtype != torch.float64
        return fastest_by_block(
            device=device,
            dtype=q.dtype,
            num_blocks=seen.num_blocks(length),
            with_gradient=q.requires_grad,
            can_flex=can_flex,
        )


def _normalised(norm: nn.Module, x: Float[Tensor, "B H L E"]) -> Float[Tensor, "B H L E"]:
    """`norm(x)`, computed in fp32 at least: under autocast x is rounded, and the norm's weights are not."""
    return x if isinstance(norm, nn.Identity) else norm(at_least_fp32(x)).to(x.dtype)


def rows_at(x: Float[Tensor, "B L D"], at: Int[Tensor, "M"] | None) -> Float[Tensor, "B L D"] | Float[Tensor, "M D"]:
    """The vectors at the flat positions `at`; all of them where that is None."""
    return x if at is None else x.flatten(0, 1).index_select(0, at)
