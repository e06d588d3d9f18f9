"""What `test_head.py` runs in a process without shape checks: they cannot be compiled."""

import pytest
import torch
from torch import Tensor

from unmask.models import compiling
from unmask.models.head import token_stats


def scaled_loss(hidden: Tensor, weight: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    stats = token_stats(2 * hidden, weight, x0, mask_id=29, confidence="margin", chunk=7)
    return 3 * stats.nll.sum(), 1 + stats.confidence


@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_caller_gets_the_same(autocast: bool) -> None:
    if not compiling.should_compile("auto", torch.device("cpu")):
        pytest.skip("no compiler")
    torch._dynamo.reset()
    hidden, weight, x0 = torch.randn(6, 8).requires_grad_(), torch.randn(30, 8).requires_grad_(), torch.arange(6)
    found = []
    for compute in (scaled_loss, torch.compile(scaled_loss)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, confidence = compute(hidden, weight, x0)
        found.append([loss, confidence, *torch.autograd.grad(loss, [hidden, weight])])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)  # the caller's products may be fused: fp32 rounding
