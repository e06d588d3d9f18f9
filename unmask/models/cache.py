"""What a transformer remembers of the positions that it has read.

Dimensions: B rows, b of them that are read, G key-value heads, L positions of a canvas, E width of a head, n positions
written, W known.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor


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
