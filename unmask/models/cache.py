"""What a causal transformer remembers of the positions that it has read.

Dimensions: B rows, G key-value heads, L positions of a canvas, E width of a head, n positions written, W known.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class KeyValueCache:
    """Keys and values of every layer, for canvases of `length` positions, `width` of which are known of some row."""

    length: int
    width: int = 0
    layers: dict[int, "LayerCache"] = field(default_factory=dict)

    def layer(self, number: int) -> "LayerCache":
        return self.layers.setdefault(number, LayerCache(self))

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        """Forgets all rows but these."""
        for layer in self.layers.values():
            layer.keys, layer.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)


@dataclass
class LayerCache:
    """Of one layer. What a row has not read yet holds anything: nobody attends to it before it is written."""

    whole: KeyValueCache
    keys: Float[Tensor, "B G L E"] = field(default_factory=lambda: torch.empty(0))
    values: Float[Tensor, "B G L E"] = field(default_factory=lambda: torch.empty(0))

    def write(
        self, k: Float[Tensor, "B G n E"], v: Float[Tensor, "B G n E"], position: Int[Tensor, "B n"]
    ) -> tuple[Float[Tensor, "B G W E"], Float[Tensor, "B G W E"]]:
        """Takes in what was read at `position`; returns all that is known."""
        if self.keys.numel() == 0:
            rows, heads, _, size = k.shape
            self.keys, self.values = (x.new_zeros(rows, heads, self.whole.length, size) for x in (k, v))
        index = position[:, None, :, None].expand_as(k)
        self.keys.scatter_(2, index, k)
        self.values.scatter_(2, index, v)
        return self.keys[:, :, : self.whole.width], self.values[:, :, : self.whole.width]
