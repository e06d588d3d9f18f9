"""Block diffusion in one pass over `[xt ; x0]` is what its definition says, and what it generalises (2503.09573)."""

import pytest
import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.masking.process import make_batch, masked_batch
from unmask.models.build import build_denoiser
from unmask.models.denoiser import Denoiser
from unmask.models.transformer_config import TransformerConfig
from unmask.types import MaskedBatch, Prediction, TokenSpec

MASK, ROWS, LENGTH = 8, 3, 12
TOKENS = TokenSpec(vocab_size=9, length=LENGTH, mask_id=MASK)
ALIGNMENTS = ["same", "next"]
POSITIONS = [{}, {"learned_positions": True, "rotary": False, "tied_head": True}]


def denoiser(block_size: int | None, **settings: object) -> Denoiser:
    config = TransformerConfig(dim=16, ff_dim=24, num_layers=2, num_heads=2, block_size=block_size, **settings)
    return build_denoiser(config, TOKENS, dtype="float64")


def batch(seed: int = 0, share: float = 0.6) -> MaskedBatch:
    """The first token of every row is given: with `alignment=next` it must be."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(MASK, (ROWS, LENGTH), generator=generator)
    is_masked = torch.rand(ROWS, LENGTH, generator=generator) < share
    is_masked[:, 0] = False
    weight = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    return masked_batch(x0, torch.where(is_masked, MASK, x0), MASK, weight)


def dense(found: Tensor, given: MaskedBatch) -> Tensor:
    """(M,) -> (B, L), 0 where nothing is scored."""
    return given.scatter(found, 0.0)


def nlls(model: Denoiser, canvas: Tensor, at: Tensor, x0: Tensor) -> Tensor:
    """Of `x0` (M,), said by one stream of `canvas`."""
    return -model.logits(canvas, at).log_softmax(-1).gather(1, x0.unsqueeze(1)).squeeze(1)


def by_prefixes(model: Denoiser, given: MaskedBatch, size: int) -> Tensor:
    """(B, L): block after block, a pass over [x0 of the blocks before ; the noisy block], which sees itself whole."""
    found = torch.zeros(given.x0.shape, dtype=torch.float64)
    for start in range(0, LENGTH, size):
        end = start + size
        canvas = torch.cat([given.x0[:, :start], given.xt[:, start:end]], dim=1)
        is_asked = (canvas == MASK) & (torch.arange(end) >= start)
        at = is_asked.flatten().nonzero().squeeze(1)
        found[:, :end] = found[:, :end].masked_scatter(is_asked, nlls(model, canvas, at, given.x0[:, :end][is_asked]))
    return found


def gradients(model: Denoiser, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("settings", POSITIONS)
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("size", [1, 3, 4, 6, 12])
def test_one_pass_is_a_pass_for_every_block(size: int, alignment: str, settings: dict[str, bool]) -> None:
    model, given = denoiser(size, alignment=alignment, **settings), batch()
    weight = torch.rand(ROWS, LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    results = []
    for found in (dense(model(given).nll, given), by_prefixes(model, given, size)):
        results.append([found, *gradients(model, (found * weight).sum())])
    assert len(results[0]) > 10
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("settings", [*POSITIONS, {"checkpointing": True}, {"dropout": 0.5}])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_one_block_is_plain_diffusion_bit_for_bit(alignment: str, settings: dict[str, object]) -> None:
    given, results = batch(), []
    for size in (None, LENGTH):
        model = denoiser(size, alignment=alignment, **settings).train()
        torch.manual_seed(0)
        stats = model(given)
        results.append([stats.nll, stats.confidence, stats.top1, *gradients(model, (stats.nll * given.weight).sum())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_blocks_of_one_token_are_the_chain_rule() -> None:
    """All masked: the pass gives `-log p(x0[i] | x0[<i])`, by L passes over [x0[<i], MASK]; so it sums to the NLL."""
    model, x0 = denoiser(1), batch().x0
    given = masked_batch(x0, torch.full_like(x0, MASK), MASK, torch.ones(ROWS))
    found = dense(model(given).nll, given)
    for i in range(LENGTH):
        canvas = torch.cat([x0[:, :i], torch.full((ROWS, 1), MASK)], dim=1)
        at = torch.arange(ROWS) * (i + 1) + i
        assert torch.allclose(found[:, i], nlls(model, canvas, at, x0[:, i]), rtol=0, atol=1e-11)


def test_blocks_of_one_token_that_are_read_one_before_are_autoregression() -> None:
    """The same weights in a causal model, which reads the clean row alone."""
    x0, results = batch().x0, []
    for settings in ({"block_size": 1}, {"block_size": None, "causal": True}):
        model = denoiser(alignment="next", **settings)
        is_scored = (torch.arange(LENGTH) > 0).expand(ROWS, -1)
        xt = x0 if "causal" in settings else torch.where(is_scored, MASK, x0)
        given = make_batch(x0, xt, is_scored, torch.ones(ROWS, LENGTH))
        found = dense(model(given).nll, given)
        results.append([found, *gradients(model, found.sum())])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_a_blocks_noise_is_its_own_affair(alignment: str) -> None:
    model, given, other = denoiser(4, alignment=alignment), batch(0, share=1.0), batch(0, share=1.0)
    other.xt[:, 5:7] = other.x0[:, 5:7]  # in the second block of three
    is_changed = dense(model(given).nll, given) != dense(model(other).nll, given)
    assert not is_changed[:, :4].any()
    assert not is_changed[:, 8:].any()
    assert is_changed[:, 7].all()


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_clean_blocks_are_what_later_ones_are_told(alignment: str) -> None:
    """Also where they are masked: what the loss of a block is given is `x0`, and nothing after it."""
    model, given = denoiser(4, alignment=alignment), batch(0, share=1.0)
    told = MaskedBatch(x0=given.x0.clone(), xt=given.xt, scored=given.scored, weight=given.weight)
    told.x0[:, 5] = (told.x0[:, 5] + 1) % MASK
    is_changed = dense(model(given).nll, given) != dense(model(told).nll, given)
    assert is_changed[:, 8:].all()
    assert is_changed[:, :8].sum() == is_changed[:, 5].sum()  # whose own token is another


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_decoding_is_told_what_training_is(alignment: str) -> None:
    """`predict`, of a canvas whose earlier blocks are finished, has the confidences of the one pass."""
    model, given = denoiser(4, alignment=alignment).eval(), batch()
    stats = model(given)
    for start in (0, 4, 8):
        canvas = torch.cat([given.x0[:, :start], given.xt[:, start:]], dim=1)
        is_own = (given.xt == MASK) & (torch.arange(LENGTH) >= start) & (torch.arange(LENGTH) < start + 4)
        answer: Prediction = model.predict(canvas, is_own.flatten().nonzero().squeeze(1))
        for ours, theirs in ((answer.confidence, stats.confidence), (answer.top1, stats.top1)):
            assert torch.allclose(ours, dense(theirs, given)[is_own], rtol=0, atol=1e-11)


def test_a_large_vocabulary_reads_both_streams_too(monkeypatch: pytest.MonkeyPatch) -> None:
    given, results = batch(), []
    for large in (8192, 4):
        monkeypatch.setattr("unmask.models.denoiser.LARGE_VOCABULARY", large)
        model = denoiser(4, tied_head=True)
        stats = model(given)
        results.append([stats.nll, stats.confidence, *gradients(model, (stats.nll * given.weight).sum())])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


def test_position_0_is_never_predicted_by_what_is_before() -> None:
    x0 = batch().x0
    given = masked_batch(x0, torch.full_like(x0, MASK), MASK, torch.ones(ROWS))
    with pytest.raises(UserError, match="position 0 of an example is to be predicted"):
        denoiser(4, alignment="next")(given)
