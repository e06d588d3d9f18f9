"""Counts memory exactly, tensor by tensor, where a process's own peak would also show allocators and libraries."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all that operations make inside the context, for as long as it lives.

    Views count once, and what was there before not at all. What an operation frees before it returns is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        given = {each.untyped_storage()._cdata for each in leaves}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and not made.is_meta and made.untyped_storage()._cdata not in given:
                self._count(made)
        return result

    def forget_peak(self) -> None:
        self.peak = self.now

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def size_of(tensors: Any) -> int:
    """Counts the bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)
