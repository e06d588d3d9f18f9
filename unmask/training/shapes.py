"""Whether weights are of a model."""

from collections.abc import Mapping

from torch import Tensor


def differences(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """The first tensors of `other` whose shapes are not those of `own`, in words; empty where all are."""
    wrong = [name for name in sorted({*own, *other}) if _shape(own, name) != _shape(other, name)]
    return "; ".join(f"{name} is {_shape(other, name)}, here {_shape(own, name)}" for name in wrong[:3])


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | str:
    return tuple(tensors[name].shape) if name in tensors else "missing"
