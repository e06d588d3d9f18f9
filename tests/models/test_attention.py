import pytest
import torch

from unmask.models.attention import BACKENDS, fastest


def heads(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(3, 2, 21, 8, dtype=dtype, requires_grad=True) for _ in range(3)]


# In bfloat16 the two round at different places; a value here is about 1, its rounding step 2^-8.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "sdpa"])
def test_backends_agree_in_values_and_gradients(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    weight = torch.randn(3, 2, 21, 8, dtype=dtype)
    results = []
    for name in ("sdpa", backend):
        qkv = heads(dtype)
        mixed = BACKENDS[name](*qkv, 0.0)
        results.append([mixed, *torch.autograd.grad((mixed * weight).sum(), qkv)])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype == dtype
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
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
