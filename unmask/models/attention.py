"""Multi-head self-attention with rotary positions (full, causal or block by block), its key-value cache and its norm.

Dimensions: B rows, L positions, M selected positions, D width, H heads, G key-value heads, J = H + 2 G, E width of a
head, P = E / 2 pairs of channels, A angles of a position. With a cache: b of B rows are read, n positions of each,
beside W cached ones.
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
    """`x / rms(x) * weight`, in the precision of x."""

    # FSDP2 gathers the weights in bfloat16 (`training/parallel.py`), while the residual stream is fp32.
    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


@dataclass
class KeyValueCache:
    """Keys and values of every layer, for canvases of `length` positions.

    Args:
        length: positions of a canvas.
        num_rows: rows of the cache.
        width: positions, from the first one on, that may be attended to; everything that any row has read is in there.
    """

    length: int
    num_rows: int
    width: int = 0
    layers: dict[int, "LayerCache"] = field(default_factory=dict)

    def layer(self, number: int) -> "LayerCache":
        """Returns the cache of one layer, made at the first call."""
        return self.layers.setdefault(number, LayerCache(self))

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        """Keeps these rows and drops all others."""
        self.num_rows = len(rows)
        for layer in self.layers.values():
            layer.keys, layer.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)


@dataclass
class LayerCache:
    """Keys and values of one layer. Positions that a row has not read yet are undefined, and never attended to."""

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
        """Writes keys and values at `position` of `rows` (None: all rows); returns all cached ones of these rows."""
        if self.keys.numel() == 0:
            shape = (self.whole.num_rows, k.shape[1], self.whole.length, k.shape[3])
            self.keys, self.values = k.new_zeros(shape), v.new_zeros(shape)
        width = self.whole.width
        if rows is not None:
            index = (rows.unsqueeze(1), slice(None), position)
            self.keys[index], self.values[index] = k.transpose(1, 2), v.transpose(1, 2)
            return self.keys[rows, :, :width], self.values[rows, :, :width]
        # With all rows the visible part is a view; indexing by rows, as above, would copy it in every layer.
        index_of_all = position[:, None, :, None].expand_as(k)
        self.keys.scatter_(2, index_of_all, k)
        self.values.scatter_(2, index_of_all, v)
        return self.keys[:, :, :width], self.values[:, :, :width]


def set_training_backend(model: nn.Module, backend: str | None) -> None:
    """Sets the backend that every attention of `model` with `backend="auto"` uses when there are gradients."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.training_backend = backend


def rotate(x: Heads, cos: Float[Tensor, "*rows L A"], sin: Float[Tensor, "*rows L A"]) -> Heads:
    """Rotates the channel pairs (e, e + E/2) by the position's angles: the half-split layout of Llama and Qwen.

    Each pair turns by one angle, so that a product of rotated queries and keys depends on their distance alone
    (Su et al. 2021, 2104.09864). With an angle of its own for each channel, A = E instead of E / 2, it does not.
    """
    first, second = x.chunk(2, dim=-1)
    is_per_channel = cos.shape[-1] == x.shape[-1]
    (cos_1, cos_2), (sin_1, sin_2) = (each.chunk(2, dim=-1) if is_per_channel else (each, each) for each in (cos, sin))
    return torch.cat((first * cos_1 - second * sin_1, second * cos_2 + first * sin_2), dim=-1).to(x.dtype)


def rotary_angles(
    length: int, head_dim: int, theta: float, dtype: torch.dtype = torch.float32, *, layout: str = "standard"
) -> tuple[Float[Tensor, "L A"], Float[Tensor, "L A"]]:
    """Computes cos and sin of the angles that the channels of a head turn by, rounded to `dtype`.

    Args:
        length: positions.
        head_dim: E.
        theta: base of the frequencies.
        dtype: number format.
        layout: `standard`: `position * theta^(-2 e / E)` for the pairs e in 0 .. P - 1. `reference`, the PUMA paper's
            code: channel c has the angle of e = c mod P, but turns with its neighbour, 2 e with 2 e + 1; its angles are
            fp32. The even channels come first here, then the odd ones, so that A = E.
    """
    # Weights may wait on the meta device until they are read, but no file has these.
    device = "cpu" if torch.get_default_device().type == "meta" else None
    if layout == "reference":
        turn = 1 / theta ** (torch.arange(0, head_dim, 2, device=device) / head_dim)
        by_channel = torch.outer(torch.arange(length, dtype=torch.float32, device=device), turn).repeat(1, 2)
        angle = torch.cat([by_channel[:, 0::2], by_channel[:, 1::2]], dim=1)
        return angle.cos().to(dtype), angle.sin().to(dtype)
    # In fp64: the error of a rounded frequency grows with the position.
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequency)
    return angle.cos().to(dtype), angle.sin().to(dtype)


class Attention(nn.Module):
    """Attention to the positions that the pattern `seen` allows, in one stream or in two.

    Args:
        num_kv_heads: below `num_heads`, groups of heads share keys and values.
        backend: a key of `BACKENDS`, or `auto`: with gradients `training_backend`, if `set_training_backend` has set
            it, else the choice of `fastest`.
        qk_norm_eps: applies an RMSNorm, over the head's width, to every query and key (Qwen3); default: no norm.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        qkv_bias: bool,
        out_bias: bool = False,
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
        self.out = nn.Linear(num_heads * self.head_dim, dim, bias=out_bias)
        self.q_norm, self.k_norm = (
            nn.Identity() if qk_norm_eps is None else RmsNorm(self.head_dim, eps=qk_norm_eps) for _ in range(2)
        )

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        angles: tuple[Float[Tensor, "L A"], Float[Tensor, "L A"]] | None,
        at: Int[Tensor, "M"] | None = None,
        noisy: int = 0,
    ) -> Float[Tensor, "B L D"] | Float[Tensor, "M D"]:
        """Computes attention over `x`.

        Args:
            x: the vectors of one stream, or of two.
            angles: cos and sin of the rotary positions, if there are any.
            at: flat positions to return the result at; default: all, as (B, L, D).
            noisy: number of positions of the noisy stream (`AttentionPattern`).
        """
        q, k, v = self._project(x)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        groups = self.num_heads // self.num_kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        seen = replace(self.seen, noisy=noisy)
        mixed = BACKENDS[self._backend_for(q, seen)](q, k, v, self.dropout if self.training else 0.0, seen)
        return self.out(select_positions(mixed.transpose(1, 2).flatten(2), at))

    def extend(
        self,
        x: Float[Tensor, "B n D"],
        angles: tuple[Float[Tensor, "B 1 n A"], Float[Tensor, "B 1 n A"]] | None,
        position: Int[Tensor, "B n"],
        known: LayerCache,
        rows: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B n D"]:
        """Writes the vectors at `position` into the cache `known` of `rows`, then attends to all cached positions."""
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
        """Computes queries, keys and values."""
        own = (self.q, self.k, self.v)
        if all(type(module) is nn.Linear for module in own):
            # One product is faster than three narrow ones, and so is its backward pass.
            weight = torch.cat([self.q.weight, self.k.weight, self.v.weight])
            bias = None if self.q.bias is None else torch.cat([self.q.bias, self.k.bias, self.v.bias])
            projected = F.linear(x, weight, bias)
        else:  # adapters, quantised weights: they are more than their `weight`
            projected = torch.cat([module(x) for module in own], dim=-1)
        heads: Float[Tensor, "B J L E"] = projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return _normalise(self.q_norm, q), _normalise(self.k_norm, k), v

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


def _normalise(norm: nn.Module, x: Float[Tensor, "B H L E"]) -> Float[Tensor, "B H L E"]:
    """Applies `norm` in fp32 at least."""
    # Under autocast x comes rounded from a product, while the norm's weights are fp32.
    return x if isinstance(norm, nn.Identity) else norm(at_least_fp32(x)).to(x.dtype)


def select_positions(
    x: Float[Tensor, "B L D"], at: Int[Tensor, "M"] | None
) -> Float[Tensor, "B L D"] | Float[Tensor, "M D"]:
    """Selects the vectors at the flat positions `at`; None: returns `x`."""
    return x if at is None else x.flatten(0, 1).index_select(0, at)
