import pytest
import torch

from unmask.masking.process import masked_batch
from unmask.models import denoiser as denoising
from unmask.models import precision
from unmask.models.build import build_denoiser
from unmask.models.denoiser import Denoiser
from unmask.models.transformer_config import TransformerConfig
from unmask.types import MaskedBatch, Query, TokenSpec


def test_auto_takes_bf16_only_where_the_hardware_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for has_bf16, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(precision, "_cpu_has_bf16", lambda has=has_bf16: has)
        assert precision.resolve_dtype("auto", cpu) == expected
        assert precision.resolve_dtype("float64", cpu) == "float64"


def test_autocast_rounds_products_and_keeps_parameters() -> None:
    layer = torch.nn.Linear(4, 4)
    with precision.autocast("bfloat16", torch.device("cpu")):
        assert layer(torch.randn(2, 4)).dtype == torch.bfloat16
    assert layer.weight.dtype == precision.parameter_dtype("bfloat16") == torch.float32
    with precision.autocast("float32", torch.device("cpu")):
        assert layer(torch.randn(2, 4)).dtype == torch.float32


def denoiser(dtype: str, **settings: object) -> tuple[Denoiser, MaskedBatch]:
    tokens = TokenSpec(vocab_size=20, length=12, mask_id=19)
    model = build_denoiser(TransformerConfig(preset="tiny", **settings), tokens, seed=1, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(19, (5, 12), generator=generator)
    xt = torch.where(torch.rand(5, 12, generator=generator) < 0.5, tokens.mask_id, x0)
    return model, masked_batch(x0, xt, tokens.mask_id, torch.ones(5))


@pytest.mark.parametrize("large_from", [1, 100])
@pytest.mark.parametrize("settings", [{}, {"self_conditioning": True}, {"block_size": 4}])
def test_a_model_enters_autocast_by_itself(
    monkeypatch: pytest.MonkeyPatch, large_from: int, settings: dict[str, object]
) -> None:
    """Bit for bit what a caller's autocast around the same model gives, gradients too."""
    monkeypatch.setattr(denoising, "LARGE_VOCABULARY", large_from)
    own, batch = denoiser("bfloat16", **settings)
    plain, _ = denoiser("float32", **settings)
    ours, context = own(batch), torch.autocast("cpu", torch.bfloat16)
    with context:
        expected = plain(batch)
    for one, other in ((ours.nll, expected.nll), (ours.confidence, expected.confidence)):
        assert torch.equal(one, other)
    assert not torch.equal(ours.nll, plain(batch).nll)
    ours.nll.sum().backward()
    expected.nll.sum().backward()
    for one, other in zip(own.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    xt, at = batch.xt, batch.at
    with torch.no_grad(), precision.casts_kept():
        logits, found = own.logits(xt, at), own.predict(xt, at, Query())
    with torch.no_grad(), context:
        assert torch.equal(logits, plain.logits(xt, at))
        asked = plain.predict(xt, at, Query())
    assert torch.equal(found.values, asked.values)
    assert torch.equal(found.confidence, asked.confidence)


def test_a_dtype_can_change_and_casts_are_not_kept_too_long() -> None:
    model, batch = denoiser("bfloat16")
    rounded = model(batch).nll
    assert model.use_dtype("float64").compute_dtype == "float64"
    assert model(batch).nll.dtype == torch.float64
    assert torch.equal(model.use_dtype("bfloat16")(batch).nll, rounded)
    with torch.no_grad():
        with precision.casts_kept():
            model(batch)
        model.backbone.head_weight.mul_(2)
    assert not torch.equal(model(batch).nll, rounded)
