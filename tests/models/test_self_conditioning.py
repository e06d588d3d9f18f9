"""Self-conditioning in the network and in training; decoding: `tests/decoding/test_self_conditioned.py`."""

import copy
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.helpers.likelihood import nelbo
from tests.helpers.runs import toy_trainer
from unmask.masking.process import make_batch, masked_batch
from unmask.models import denoiser as denoiser_module
from unmask.models.build import build_denoiser
from unmask.models.denoiser import Denoiser, has_first_pass
from unmask.models.head import expected_value
from unmask.models.transformer_config import TransformerConfig
from unmask.training.trainer import Trainer
from unmask.types import CleanBatch, MaskedBatch, TokenSpec, TokenStats

MASK, LENGTH = 10, 12
TOKENS = TokenSpec(vocab_size=11, length=LENGTH, mask_id=MASK)
KINDS = [{}, {"alignment": "next"}, {"block_size": 4}, {"block_size": 4, "alignment": "next"}, {"tied_head": True}]
TOLD, UNTOLD = next(s for s in range(2) if has_first_pass(0, s)), next(s for s in range(2) if not has_first_pass(0, s))


def denoiser(*, is_trained: bool = True, **settings: object) -> Denoiser:
    """`is_trained`: with weights of self-conditioning that are not 0."""
    settings = {"preset": "tiny", "self_conditioning": True, **settings}
    model = build_denoiser(TransformerConfig(**settings), TOKENS, dtype="float64")
    if is_trained and model.is_self_conditioned:
        torch.nn.init.normal_(model.backbone.conditioning.weight, generator=torch.Generator().manual_seed(1))
    return model


def batch(step: int | None = None, rows: int = 3, seed: int = 0) -> MaskedBatch:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(MASK, (rows, LENGTH), generator=generator)
    is_masked = torch.rand(rows, LENGTH, generator=generator) < 0.6
    is_masked[:, 0] = False
    made = masked_batch(x0, torch.where(is_masked, MASK, x0), MASK, torch.ones(rows, dtype=torch.float64))
    return MaskedBatch(x0=made.x0, xt=made.xt, scored=made.scored, weight=made.weight, step=step)


def gradients(model: Denoiser, given: MaskedBatch) -> dict[str, Tensor | None]:
    model.zero_grad()
    (model(given).nll * given.weight).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("settings", KINDS)
def test_at_first_it_is_the_plain_model(settings: dict) -> None:
    """Told something or nothing; the gradients too, but of the weights that the plain one does not have."""
    plain, own = denoiser(self_conditioning=False, **settings), denoiser(is_trained=False, **settings)
    for step in (TOLD, UNTOLD):
        given = batch(step)
        assert torch.equal(plain(given).nll, own(given).nll)
        assert torch.equal(plain(given).confidence, own(given).confidence)
        found = gradients(own, given)
        for name, gradient in gradients(plain, given).items():
            assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("settings", KINDS)
@pytest.mark.parametrize("vocabulary", [8, 8192])
def test_every_parameter_has_a_gradient_in_every_step(
    settings: dict, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoiser_module, "LARGE_VOCABULARY", vocabulary)
    model = denoiser(**settings)
    for step in (TOLD, UNTOLD, None):
        found = gradients(model, batch(step))
        assert not [name for name, gradient in found.items() if gradient is None]
        assert found["backbone.conditioning.weight"].any() == (step != UNTOLD)


def by_hand(model: Denoiser, given: MaskedBatch) -> Tensor:
    """Of a model of whole canvases: `softmax @ embedding` of a pass that is told nothing, at the masked positions."""
    at = (given.xt == MASK).flatten().nonzero().squeeze(1)
    p = model.logits(given.xt, at).softmax(-1)
    estimate = torch.zeros(given.xt.numel(), model.backbone.config.dim, dtype=torch.float64)
    estimate[at] = p @ model.backbone.embedding.weight
    return estimate.view(*given.xt.shape, -1)


@pytest.mark.parametrize("settings", [{}, {"alignment": "next"}, {"tied_head": True}])
@pytest.mark.parametrize("vocabulary", [8, 8192])
def test_it_is_told_the_expected_embeddings(settings: dict, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss, and with it the confidences, are those of the second pass, told what is computed here by hand."""
    monkeypatch.setattr(denoiser_module, "LARGE_VOCABULARY", vocabulary)
    model, given = denoiser(**settings), batch(TOLD)
    estimate = by_hand(model, given).detach()
    x0 = given.gather(given.x0)
    log_probs = model.logits(given.xt, given.at, estimate).log_softmax(-1)
    stats = model(given)
    assert torch.allclose(stats.nll, -log_probs.gather(1, x0[:, None]).squeeze(1), rtol=1e-10, atol=1e-12)
    assert torch.allclose(stats.confidence, log_probs.exp().amax(1), rtol=1e-10)
    assert not torch.allclose(stats.nll, model(batch(UNTOLD)).nll, rtol=1e-3)


def test_what_is_told_is_a_constant_to_the_gradient() -> None:
    """The gradient is that of a second pass which is handed numbers, not that through the first."""
    model, given = denoiser(), batch(TOLD)
    expected = gradients(model, given)
    handed, own = by_hand(model, given).detach(), {}
    for name, estimate in (("handed", handed), ("through", by_hand(model, given))):
        model.zero_grad()
        log_probs = model.logits(given.xt, given.at, estimate).log_softmax(-1)
        nll = -log_probs.gather(1, given.gather(given.x0)[:, None]).squeeze(1)
        (nll * given.weight).sum().backward()
        own[name] = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    for key, gradient in expected.items():
        assert torch.allclose(gradient, own["handed"][key], rtol=1e-8, atol=1e-11), key
    assert not torch.allclose(expected["backbone.norm.weight"], own["through"]["backbone.norm.weight"], rtol=1e-3)


@pytest.mark.parametrize("chunk", [1, 3, 7, 1024])
def test_the_expected_embedding_is_that_of_the_softmax(chunk: int) -> None:
    """In any chunks, one of them the mask alone; large logits, and tokens that are forbidden."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, embedding = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (6, 11, 11))
    forbidden = torch.tensor([0, 4])
    logits = (100 * hidden @ weight.T).index_fill(1, torch.tensor([0, 4, 10]), -torch.inf)
    found = expected_value(100 * hidden, weight, embedding, mask_id=10, forbidden=forbidden, chunk=chunk)
    assert torch.allclose(found, logits.softmax(-1) @ embedding, rtol=1e-9, atol=1e-12)


def test_visible_positions_are_told_nothing() -> None:
    """Also where a process scores them, and where padding stands for the last position."""
    model, given = denoiser(), batch(TOLD)
    everything = make_batch(given.x0, given.xt, torch.ones_like(given.xt, dtype=torch.bool), torch.ones(given.xt.shape))
    told = model._self_condition(everything)
    assert told[given.xt == MASK].abs().amax(-1).gt(0).all()
    assert not told[given.xt != MASK].any()
    assert torch.allclose(told, model._self_condition(given), rtol=1e-10)


def test_half_of_the_steps_are_told_and_no_one_knows_which() -> None:
    told = torch.tensor([has_first_pass(5, step) for step in range(4000)])
    assert (told[::2] ^ told[1::2]).all()  # one of each two
    assert abs(told[::2].double().mean() - 0.5) < 4 * 0.5 / 2000**0.5
    assert abs((told[:-2:2] == told[2::2]).double().mean() - 0.5) < 4 * 0.5 / 2000**0.5
    assert has_first_pass(5, None)
    assert told.tolist() != [has_first_pass(6, step) for step in range(4000)]


@pytest.mark.parametrize("process", ["{name: uniform}", "{name: puma, num_stages: 3, threshold: 0.9}"])
def test_it_trains_and_does_not_depend_on_how_a_batch_is_split(process: str) -> None:
    settings = [f"process={process}", "model.self_conditioning=true"]
    whole, parts = toy_trainer(*settings), toy_trainer(*settings, "train.accumulate=4")
    for _ in range(6):
        assert parts.step().loss.item() == pytest.approx(whole.step().loss.item(), rel=1e-9)
    assert whole.model.backbone.conditioning.weight.abs().max() > 1e-4


@pytest.mark.parametrize(
    "process",
    [
        "{name: puma, num_stages: 4, threshold: 0.9}",
        "{name: puma, num_stages: 4, block_size: 3}",
        "{name: puma_variable, tokens_per_step: 2}",
    ],
)
def test_a_pool_tells_its_rows_what_the_last_step_said_of_them(process: str) -> None:
    """As decoding does: in one pass a step, and of rows that are new, nothing."""
    trainer = toy_trainer(f"process={process}", "model.self_conditioning=true", "train.dtype=float64")
    model, passes, seen = trainer.model, [], []
    torch.nn.init.normal_(model.backbone.conditioning.weight, generator=torch.Generator().manual_seed(1))
    run = "forward" if model.block_size is None else "two_streams"
    counted = getattr(model.backbone, run)
    setattr(model.backbone, run, lambda *arguments: passes.append(1) or counted(*arguments))

    def remember(_: object, arguments: tuple[MaskedBatch], __: TokenStats) -> None:
        (given,) = arguments
        hidden = model._hidden(given, model._self_condition(given)).detach()
        passes.pop()
        flat = torch.zeros(given.x0.numel() + 1, hidden.shape[1], dtype=torch.float64)
        flat[given.scored] = (model._head(hidden).softmax(-1) @ model.backbone.embedding.weight).detach()
        seen.append((given, flat[:-1].view(*given.x0.shape, -1), trainer.process.rows.example))

    model.register_forward_hook(remember)
    for _ in range(6):
        trainer.step()
    assert len(passes) == 6
    assert seen[0][0].estimate is None
    num_new = 0
    for (_, said, before), (given, _, now) in pairwise(seen):
        is_here = (before == now).unsqueeze(1)
        num_new += int((~is_here).sum())
        is_told = is_here & (given.xt == trainer.tokens.mask_id)
        assert is_told.any()
        assert torch.allclose(given.estimate, torch.where(is_told.unsqueeze(-1), said, 0.0), rtol=1e-9, atol=1e-12)
    assert num_new > 0


def test_the_likelihood_is_that_of_two_passes_over_the_same_masks() -> None:
    """So the bound holds: what is told is a function of `xt` alone."""
    model = denoiser().eval()
    x0 = torch.randint(MASK, (40, LENGTH), generator=torch.Generator().manual_seed(3))
    examples = CleanBatch(x0=x0, prompt_mask=torch.zeros_like(x0, dtype=torch.bool))
    seen: list[MaskedBatch] = []
    model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    found = nelbo(model, examples, draws=1).value
    (given,) = seen
    log_probs = model.logits(given.xt, given.at, by_hand(model, given)).log_softmax(-1)
    nll = -log_probs.gather(1, given.gather(given.x0)[:, None]).squeeze(1)
    assert found == pytest.approx((nll * given.weight).sum().item() / 40, rel=1e-9)


def test_a_causal_model_cannot_be() -> None:
    with pytest.raises(ValidationError, match=r"model\.self_conditioning=true is for masked positions"):
        TransformerConfig(preset="tiny", causal=True, alignment="next", self_conditioning=True)


def steps(trainer: Trainer, count: int) -> list[float]:
    return [trainer.step().loss.item() for _ in range(count)]


def test_what_is_drawn_follows_the_step_of_the_run() -> None:
    """A trainer that takes over at step 3 draws as the one that goes on."""
    settings = ["model.self_conditioning=true", "process.name=uniform"]
    first, second = toy_trainer(*settings), toy_trainer(*settings)
    steps(first, 3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert steps(first, 5) == steps(second, 5)
