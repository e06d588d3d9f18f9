"""What `tests/training/test_compiled.py` runs in a process without shape checks: they cannot be compiled."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from unmask.masking.process import make_batch
from unmask.models import precision
from unmask.models.build import build_denoiser
from unmask.models.head import token_stats
from unmask.models.transformer_config import TransformerConfig
from unmask.types import MaskedBatch, TokenSpec


@pytest.fixture(autouse=True)
def _needs_compiler() -> None:
    if not precision.should_compile("auto", torch.device("cpu")):
        pytest.skip("no compiler")
    torch._dynamo.reset()


def scaled_loss(hidden: Tensor, weight: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    stats = token_stats(2 * hidden, weight, x0, mask_id=29, confidence="margin", chunk=7)
    return 3 * stats.nll.sum(), 1 + stats.confidence


@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_caller_gets_the_same(autocast: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator).requires_grad_() for n in (6, 30))
    x0 = torch.arange(6)
    found = []
    for compute in (scaled_loss, torch.compile(scaled_loss)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, confidence = compute(hidden, weight, x0)
        found.append([loss, confidence, *torch.autograd.grad(loss, [hidden, weight])])
    for one, other in zip(*found, strict=True):
        # The caller's products may be fused: fp32 rounding, of the largest terms, as a sum of some may be near 0.
        assert torch.allclose(one, other, rtol=0, atol=1e-5 * float(one.detach().abs().max()))


def masked(share: float) -> MaskedBatch:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(8, (16, 24), generator=generator)
    is_masked = (torch.rand(16, 24, generator=generator) < share) & (torch.arange(24) > 0)
    return make_batch(x0, torch.where(is_masked, 8, x0), is_masked, torch.ones(16, 24))


def test_compiled_streams_are_the_plain_ones_and_compile_once() -> None:
    config = TransformerConfig(
        dim=16, ff_dim=24, num_layers=1, num_heads=2, block_size=4, alignment="next", checkpointing=True
    )
    plain, compiled = (build_denoiser(config, TokenSpec(vocab_size=9, length=24, mask_id=8)) for _ in range(2))
    compiled.compile_training()
    graphs = 0
    for share in (0.3, 0.9):  # other numbers of scored positions
        found = []
        for model in (plain, compiled):
            loss = (model(masked(share)).nll * masked(share).weight).sum()
            found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        for one, other in zip(*found, strict=True):
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)  # fp32, fused, summed over some 100 positions
        graphs = graphs or counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == graphs > 0
