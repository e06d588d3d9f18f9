"""A digest is that of values under names: where and how they are stored makes no difference, all else does."""

import hashlib
import struct

import pytest
import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.training import digest
from unmask.training.digest import weights_digest
from unmask.training.initial import Base, BaseTensors

WEIGHTS = {
    "b": torch.randn(40, 30, generator=torch.Generator().manual_seed(0)),
    "a": torch.ones(3),
    "n": torch.arange(5),
}
"""Of fp32, of bfloat16 stored in fp32, and of whole numbers."""


def stored(dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in WEIGHTS.items()}


def test_a_wider_format_with_the_same_values_has_the_same_digest() -> None:
    assert weights_digest(stored(torch.float64)) == weights_digest(WEIGHTS)
    rounded = stored(torch.bfloat16)
    assert weights_digest(rounded | {"b": rounded["b"].float()}) == weights_digest(rounded)
    assert weights_digest(rounded) != weights_digest(WEIGHTS)
    halves = stored(torch.float16)
    assert weights_digest(halves | {"b": halves["b"].float()}) == weights_digest(halves)


@pytest.mark.parametrize(
    "change",
    [
        {"b": WEIGHTS["b"].T},
        {"b": WEIGHTS["b"].reshape(30, 40)},
        {"b": WEIGHTS["b"] + torch.zeros(40, 30).index_put((torch.tensor(39), torch.tensor(29)), torch.tensor(1e-6))},
        {"a": -WEIGHTS["a"]},
        {"n": WEIGHTS["n"].to(torch.int32)},
        {"c": torch.zeros(0)},
    ],
)
def test_other_weights_have_another_digest(change: dict[str, Tensor]) -> None:
    assert weights_digest(WEIGHTS | change) != weights_digest(WEIGHTS)


def test_order_layout_and_number_of_threads_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tensor of several parts, only one of which needs fp32."""
    large = torch.ones(3, 2**18 - 5)
    large[1, 7] = 1.1
    expected = weights_digest(WEIGHTS | {"large": large})
    assert expected != weights_digest(WEIGHTS | {"large": large.bfloat16()})
    monkeypatch.setattr(digest, "cpus", lambda: 5)
    turned = {"n": WEIGHTS["n"], "b": WEIGHTS["b"].T.contiguous().T, "large": large.double(), "a": WEIGHTS["a"]}
    assert weights_digest(turned) == expected


def test_digests_of_older_versions_are_compared_in_their_way() -> None:
    """The SHA-256 of names, shapes and values in fp32, as it was written before; it is asked for by one like it."""
    old = weights_digest({"a": WEIGHTS["a"]}, like="0" * 64)
    assert old == hashlib.sha256(b'["a", [3]]' + struct.pack("<3f", 1, 1, 1)).hexdigest()
    assert weights_digest({"a": WEIGHTS["a"].bfloat16()}, like=old) == old
    assert weights_digest(WEIGHTS, like=weights_digest(WEIGHTS)) == weights_digest(WEIGHTS)
    tensors = BaseTensors({"a": WEIGHTS["a"]})
    base = Base("folder", tensors, mask_is_new=False, mask_row=0)
    for kept in (old, weights_digest({"a": WEIGHTS["a"]})):
        base.check({"sha256": kept}, "step_1")
        tensors.read_all()
        with pytest.raises(UserError, match="adapters were trained on weights with SHA-256"):
            base.check({"sha256": kept[:-1] + "x"}, "step_1")
