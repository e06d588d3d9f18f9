"""Tensors that are read or made when they are asked for, so that a large model's are never all in memory."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


class OnDemand(Mapping[str, Tensor]):
    """Tensors by name, of which none is kept: each access reads or makes one anew.

    Args:
        outlines: tensors of the same names, shapes and formats, such as on the meta device.
        read: returns the tensor of a name, on the CPU.
    """

    def __init__(self, outlines: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
        self.outlines = outlines
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.outlines:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.outlines)

    def __len__(self) -> int:
        return len(self.outlines)


def outlines_of(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Returns tensors of the names, shapes and formats of `tensors`, and reads none of them."""
    return tensors.outlines if isinstance(tensors, OnDemand) else tensors


def outline(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Returns a tensor of this shape and format without values."""
    return torch.empty(shape, dtype=dtype, device="meta")
