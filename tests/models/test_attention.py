import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from unmask.errors import UserError
from unmask.models import measuring
from unmask.models.attention import Attention, KeyValueCache, set_training_backend
from unmask.models.backends import BACKENDS, fastest
from unmask.models.measuring import measure_fastest
from unmask.models.visibility import EVERYTHING, AttentionPattern

SEEN = {False: EVERYTHING, True: AttentionPattern(size=1)}


def heads(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(3, 2, 21, 8, dtype=dtype, requires_grad=True) for _ in range(3)]


# In bfloat16 the two round at different places; a value here is about 1, its rounding step 2^-8.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("backend", ["matmul"])
def test_backends_agree_in_values_and_gradients(
    backend: str, is_causal: bool, dtype: torch.dtype, tolerance: float
) -> None:
    weight = torch.randn(3, 2, 21, 8, dtype=dtype)
    results = []
    for name in ("sdpa", backend):
        qkv = heads(dtype)
        mixed = BACKENDS[name](*qkv, 0.0, SEEN[is_causal])
        results.append([mixed, *torch.autograd.grad((mixed * weight).sum(), qkv)])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype == dtype
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_flex_attention_agrees_in_values(dtype: torch.dtype, is_causal: bool) -> None:
    """On CPUs it has no backward pass; `tests/test_gpu.py` compares the gradients."""
    qkv = [x.detach() for x in heads(dtype)]
    found, expected = (BACKENDS[name](*qkv, 0.0, SEEN[is_causal]) for name in ("flex", "sdpa"))
    assert torch.allclose(found, expected, atol=1e-6)
    with pytest.raises(UserError, match="use auto, sdpa or matmul"):
        BACKENDS["flex"](*heads(dtype), 0.0)


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_causal_attention_is_attention_to_what_came_before(backend: str) -> None:
    """Position i alone, with the keys and values up to i."""
    q, k, v = (x.detach() for x in heads(torch.float64))
    found = BACKENDS[backend](q, k, v, 0.0, SEEN[True])
    for i in range(q.shape[2]):
        weights = (q[:, :, i : i + 1] @ k[:, :, : i + 1].mT / 8**0.5).softmax(-1)
        assert torch.allclose(found[:, :, i : i + 1], weights @ v[:, :, : i + 1])


def test_equal_and_extreme_scores() -> None:
    """Where all scores are equal, the mean of the values; where one towers, its value, without overflow."""
    q, k, v = (x.detach() for x in heads(torch.float32))
    assert torch.allclose(BACKENDS["matmul"](0 * q, k, v, 0.0), v.mean(2, keepdim=True).expand_as(v), atol=1e-6)
    best = (q @ k.mT).argmax(-1, keepdim=True).expand(-1, -1, -1, 8)
    assert torch.allclose(BACKENDS["matmul"](1e6 * q, k, v, 0.0), v.gather(2, best))


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_dropout_keeps_the_mean(backend: str) -> None:
    q, k, v = heads(torch.float64)
    torch.manual_seed(1)
    mean = torch.stack([BACKENDS[backend](q, k, v, 0.5) for _ in range(4000)]).mean(0)
    assert torch.allclose(mean, BACKENDS[backend](q, k, v, 0.0), atol=0.1)
    assert not torch.equal(BACKENDS[backend](q, k, v, 0.5), BACKENDS[backend](q, k, v, 0.0))


def test_plain_products_are_for_short_training_in_bfloat16_on_a_cpu() -> None:
    case = {"device": "cpu", "dtype": torch.bfloat16, "length": 81, "with_gradient": True}
    assert fastest(**case) == "matmul"
    for change in ({"device": "cuda"}, {"dtype": torch.float32}, {"length": 512}, {"with_gradient": False}):
        assert fastest(**{**case, **change}) == "sdpa"


def layer(backend: str = "auto") -> Attention:
    return Attention(16, 2, 2, qkv_bias=False, dropout=0.0, backend=backend)


CASE = {"rows": 3, "length": 7, "dtype": torch.bfloat16}


def test_the_fastest_is_the_one_that_took_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    took = {BACKENDS["sdpa"]: 2.0, BACKENDS["matmul"]: 1.0}
    monkeypatch.setattr(measuring, "_seconds", lambda run, case: took[run])
    case = measuring.Case(3, 2, 7, 8, "bfloat16", torch.get_num_threads())
    assert measuring.measure(case) == "matmul"
    took[BACKENDS["sdpa"]] = 0.5
    assert measuring.measure(case) == "sdpa"


def test_it_is_measured_at_the_sizes_of_the_model_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(measuring.Case(**json.loads(command[-1])))
        return SimpleNamespace(stdout="some notice\nmatmul\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert measure_fastest(layer(), **CASE) == "matmul"
    assert asked == [measuring.Case(3, 2, 7, 8, "bfloat16", torch.get_num_threads())]
    assert measure_fastest(layer("sdpa"), **CASE) is None
    assert measure_fastest(torch.nn.Linear(2, 2), **CASE) is None
    assert measure_fastest(layer(), **{**CASE, "length": 5000}) is None
    assert len(asked) == 1


def test_a_measurement_that_fails_leaves_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert measure_fastest(layer(), **CASE) is None


def test_what_was_measured_is_for_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    for name in ("sdpa", "matmul"):
        monkeypatch.setitem(BACKENDS, name, lambda q, k, v, dropout, seen, name=name: used.append(name) or v)
    free, told = layer(), layer("sdpa")
    for module in (free, told):
        set_training_backend(module, "matmul")
        module(torch.randn(1, 4, 16), None)
        with torch.no_grad():
            module(torch.randn(1, 4, 16), None)
    assert used == ["matmul", "sdpa", "sdpa", "sdpa"]


class LowRank(torch.nn.Module):
    """A linear layer with an adapter, as PEFT wraps one."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias
        self.a, self.b = torch.nn.Linear(base.in_features, 2), torch.nn.Linear(2, base.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.b(self.a(x))


def both_ways(attention: Attention, x: torch.Tensor) -> list[torch.Tensor]:
    """Computes the attention over `x` as training does, and beside a cache, as decoding does."""
    known = KeyValueCache(x.shape[1], len(x), x.shape[1])
    place = torch.arange(x.shape[1]).expand(len(x), -1)
    return [attention(x, None), attention.extend(x, None, place, known.layer(0))]


@pytest.mark.parametrize("targets", ["q", "k", "v", "qkv"])
def test_an_adapter_of_a_projection_gets_a_gradient_and_moves_the_output(targets: str) -> None:
    """The three are one product where they are plain; an adapted one must not be passed over for its `weight`."""
    torch.manual_seed(0)
    attention = Attention(16, 4, 2, qkv_bias=True, dropout=0.0).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    before = both_ways(attention, x)
    adapters = {name: LowRank(getattr(attention, name)).double() for name in targets}
    for name, adapter in adapters.items():
        setattr(attention, name, adapter)
    after = both_ways(attention, x)
    assert torch.allclose(*after)
    assert not any(torch.allclose(old, new) for old, new in zip(before, after, strict=True))
    after[0].square().sum().backward()
    for name, adapter in adapters.items():
        assert all(layer.weight.grad.abs().max() > 1e-6 for layer in (adapter.a, adapter.b)), name
    for adapter in adapters.values():
        torch.nn.init.zeros_(adapter.b.weight)
        torch.nn.init.zeros_(adapter.b.bias)
    assert all(torch.allclose(old, new) for old, new in zip(before, both_ways(attention, x), strict=True))
