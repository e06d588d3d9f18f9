import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import chi_square, exact, toy
from tests.helpers.decoding import partly_given
from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig
from unmask.decoding.decoder import Decoder, predictor_from_logits
from unmask.decoding.remasking import P2, Rcr, RemdmRescale
from unmask.decoding.sampling import Sampling
from unmask.errors import NotFinite, UserError
from unmask.models.build import build_denoiser
from unmask.models.denoiser import Denoiser
from unmask.models.transformer_config import TransformerConfig
from unmask.reveal import ORDERS, CosineSteps, EntropyBound, Factor, Fixed, NumSteps, RevealState, Threshold
from unmask.types import Prediction, Query, TokenSpec

TOKENS = TokenSpec(vocab_size=8, length=14, mask_id=7)


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    config = TransformerConfig(preset="tiny", rotary=True)
    model = build_denoiser(config, TOKENS, seed=1, dtype="float64").eval()
    for parameter in model.parameters():
        parameter.data *= 4  # predictions that differ
    return model


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", [Fixed(1), Fixed(3), NumSteps(5)])
def test_every_position_is_revealed_once_and_the_given_are_kept(model, order: str, rule) -> None:  # type: ignore[no-untyped-def]
    xt = partly_given(16)
    num_masked = (xt == 7).sum(1)
    decoded = Decoder(model.predict, 7, order=order, rule=rule).decode(xt)
    assert (decoded.tokens != 7).all()
    assert torch.equal(torch.where(xt == 7, 7, decoded.tokens), xt)
    assert torch.equal(decoded.reveal_step >= 0, xt == 7)
    expected = {
        Fixed(1): num_masked,
        Fixed(3): (num_masked + 2) // 3,
        NumSteps(5): num_masked.clamp(max=5),
    }[rule]
    assert torch.equal(decoded.nfe, expected)
    assert torch.equal(decoded.reveal_step.amax(1) + 1, expected)


@pytest.mark.parametrize("order", ["prob", "margin", "neg_entropy"])
def test_one_step_at_a_time_is_the_plain_algorithm(model, order: str) -> None:  # type: ignore[no-untyped-def]
    xt = torch.full((1, 14), 7)
    decoded = Decoder(model.predict, 7, order=order).decode(xt)
    for step in range(14):
        masked = (xt[0] == 7).nonzero().flatten()
        p = model.logits(xt, masked).softmax(-1)
        top = p.sort(descending=True).values
        score = {"prob": top[:, 0], "margin": top[:, 0] - top[:, 1], "neg_entropy": torch.xlogy(p, p).sum(1)}[order]
        best = score.argmax()
        assert decoded.reveal_step[0, masked[best]] == step
        xt[0, masked[best]] = p[best].argmax()
    assert torch.equal(decoded.tokens, xt)


def test_orders_by_position_are_what_they_are_called(model) -> None:  # type: ignore[no-untyped-def]
    decoded = Decoder(model.predict, 7, order="left_to_right").decode(torch.full((2, 14), 7))
    assert decoded.reveal_step.tolist() == [list(range(14))] * 2
    decoded = Decoder(model.predict, 7, order="right_to_left").decode(torch.full((2, 14), 7))
    assert decoded.reveal_step.tolist() == [list(range(13, -1, -1))] * 2


SAMPLERS = [
    {"order": "prob"},
    {"order": "margin", "rule": Fixed(2)},
    {"order": "random", "rule": NumSteps(4)},
    {"order": "prob", "temperature": 0.7, "confidence_noise": 0.5},
    {"rule": Threshold(0.3), "block_size": 4},
    {"rule": EntropyBound(1.0), "block_size": 5, "temperature": 1.0},
    {"rule": Factor(1.5), "eos_id": 3},
    {"rule": CosineSteps(6), "remasking": P2(0.5)},
    {"rule": NumSteps(6), "remasking": Rcr(), "temperature": 1.0},
    {"rule": NumSteps(9), "remasking": RemdmRescale(0.7), "temperature": 1.0},
]


@settings(deadline=None, max_examples=15)
@given(sampler=st.sampled_from(SAMPLERS), seed=st.integers(0, 3), rows=st.permutations(range(9)))
def test_a_row_does_not_depend_on_its_batch(sampler: dict, seed: int, rows: list[int]) -> None:
    """Alone, in another order, beside other lengths: the same tokens (in fp64)."""
    config = TransformerConfig(preset="tiny", rotary=True)
    model = build_denoiser(config, TOKENS, seed=1, dtype="float64").eval()
    sampling = Sampling(temperature=sampler.get("temperature", 0.0), seed=seed)
    settings = {key: value for key, value in sampler.items() if key != "temperature"}
    decoder = Decoder(model.predict, 7, sampling=sampling, **settings)
    xt = partly_given(9, seed)
    together = decoder.decode(xt)
    shuffled = decoder.decode(xt[rows], torch.tensor(rows))
    assert torch.equal(shuffled.tokens, together.tokens[rows])
    assert torch.equal(shuffled.reveal_step, together.reveal_step[rows])
    for row in rows[:3]:
        alone = decoder.decode(xt[row : row + 1], torch.tensor([row]))
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert alone.nfe[0] == together.nfe[row]


@pytest.mark.parametrize("order", ["random", "prob", "left_to_right"])
def test_with_true_conditionals_samples_follow_the_joint(order: str) -> None:
    """One token a step at temperature 1 is the chain rule in some order: the joint distribution, exactly."""
    task = toy(values=3, length=3)
    draws = 6000
    decoder = Decoder(exact(task).predict, task.tokens.mask_id, order=order, sampling=Sampling(1.0))
    tokens = decoder.decode(torch.full((draws, 3), task.tokens.mask_id)).tokens
    counts = torch.bincount((tokens * 3 ** torch.arange(2, -1, -1)).sum(1), minlength=27).double()
    expected = task.probabilities * draws
    often = expected > 5
    assert abs(chi_square(counts[often], expected[often])) < 5


def test_temperature_sharpens() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -torch.inf], dtype=torch.float64)
    xt = torch.full((4000, 1), 3)
    for temperature in (0.5, 1.0, 2.0):
        decoder = Decoder(
            lambda xt, at, ask: Prediction.from_logits(logits.expand(len(at), 4), ask, mask_id=3),
            3,
            sampling=Sampling(temperature),
        )
        counts = torch.bincount(decoder.decode(xt).tokens.flatten(), minlength=3).double()
        assert abs(chi_square(counts, (logits[:3] / temperature).softmax(0) * 4000)) < 5


@pytest.mark.parametrize("order", ["prob", "margin", "neg_entropy"])
def test_confidence_noise_draws_the_order(order: str) -> None:
    """Gumbel's trick: of n positions with m masked, i is next with probability ~ exp(c_i)^(1 / (0.5 m / n))."""
    logits = torch.linspace(1, 3, 4).unsqueeze(1) * torch.tensor([1.0, 0.5, 0.2, -torch.inf], dtype=torch.float64)

    def predict(xt: torch.Tensor, at: torch.Tensor, ask: Query) -> Prediction:
        return Prediction.from_logits(logits[at % 4], ask, mask_id=3)

    rows = 4000
    decoded = Decoder(predict, 3, order=order, confidence_noise=0.5).decode(torch.full((rows, 4), 3))
    p = logits.softmax(-1)
    m = p[:, 0] - p[:, 1]
    weight = {"prob": p[:, 0], "margin": (1 + m) / (1 - m), "neg_entropy": torch.xlogy(p, p).sum(1).exp()}[order]
    for step in (0, 1, 2):
        is_left = decoded.reveal_step >= step
        expected = torch.where(is_left, weight ** (1 / (0.5 * (4 - step) / 4)), 0)
        expected /= expected.sum(1, keepdim=True)
        counts = (decoded.reveal_step == step).sum(0).double()
        assert abs(chi_square(counts, expected.sum(0))) < 5
    assert (decoded.tokens == 0).all()  # the values are the likeliest still


@pytest.mark.parametrize("order", ["prob", "margin", "neg_entropy"])
@pytest.mark.parametrize("sure", [0.0, 1000.0], ids=["no margin", "certain"])
def test_confidence_noise_knows_ties_and_certainty(order: str, sure: float) -> None:
    decoder = Decoder(
        lambda xt, at, ask: Prediction.from_logits(
            torch.tensor([[sure, 0.0, 0.0, 0.0]]).expand(len(at), 4), ask, mask_id=3
        ),
        3,
        order=order,
        confidence_noise=0.5,
    )
    decoded = decoder.decode(torch.full((200, 5), 3))
    assert decoded.nfe.tolist() == [5] * 200
    assert all(len(set(at.tolist())) == 5 for at in decoded.reveal_step.T)  # equally sure: any of them may be first


def test_any_callable_from_tokens_to_logits_can_be_decoded() -> None:
    embedding = torch.nn.Embedding(8, 8)
    decoder = Decoder(predictor_from_logits(embedding, mask_id=7), 7)
    decoded = decoder.decode(partly_given(5))
    assert (decoded.tokens != 7).all()


def test_nothing_to_decode_costs_nothing(model) -> None:  # type: ignore[no-untyped-def]
    decoded = Decoder(model.predict, 7).decode(torch.zeros(2, 14, dtype=torch.long))
    assert decoded.nfe.tolist() == [0, 0]


def test_the_settings_reach_the_decoder(model) -> None:  # type: ignore[no-untyped-def]
    config = DecodeConfig(confidence="margin", steps=5, temperature=0.3, confidence_noise=0.5, seed=9, block_size=7)
    decoder = build_decoder(config, model, TOKENS)
    assert (decoder.order, decoder.rule, decoder.sampling) == ("margin", NumSteps(5), Sampling(0.3, seed=9))
    assert (decoder.confidence_noise, decoder.block_size, decoder.remasking) == (0.5, 7, None)
    assert build_decoder(DecodeConfig(tokens_per_step=3), model, TOKENS).rule == Fixed(3)
    assert build_decoder(DecodeConfig(steps=4, remask="p2", remask_eta=0.5), model, TOKENS).remasking == P2(0.5)
    assert build_decoder(DecodeConfig(steps=4, remask="rcr"), model, TOKENS).remasking == Rcr(1.0)


def test_tokens_of_32_bits_are_decoded_as_those_of_64() -> None:
    predict = predictor_from_logits(lambda xt: torch.eye(4)[(xt + 1) % 3], mask_id=3)
    prompt = torch.tensor([[0, 3, 3]])
    decoder = Decoder(predict, mask_id=3)
    assert torch.equal(decoder.decode(prompt.int()).tokens, decoder.decode(prompt).tokens)


@pytest.mark.parametrize("rule", [lambda: Fixed(0), lambda: Fixed(-1), lambda: NumSteps(0), lambda: CosineSteps(-2)])
def test_a_rule_that_would_never_end_is_refused(rule) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=r"give 1 or more"):
        rule()


def test_an_unknown_order_is_named() -> None:
    predict = predictor_from_logits(lambda xt: torch.randn(*xt.shape, 4), mask_id=3)
    with pytest.raises(UserError, match="order 'low': unknown; use one of prob"):
        Decoder(predict, mask_id=3, order="low")


class Nothing:
    """A rule that breaks its promise."""

    def __call__(self, state: RevealState) -> torch.Tensor:
        return torch.zeros_like(state.eligible)


def test_a_step_that_fills_in_nothing_ends_with_an_error() -> None:
    predict = predictor_from_logits(lambda xt: torch.randn(*xt.shape, 4), mask_id=3)
    with pytest.raises(UserError, match="a step filled in nothing"):
        Decoder(predict, mask_id=3, rule=Nothing()).decode(torch.tensor([[3, 0], [1, 2]]))


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}], ids=str)
def test_impossible_samplings_are_named(settings: dict) -> None:
    (name,) = settings
    with pytest.raises(UserError, match=f"{name}=.*: give "):
        Sampling(**settings)


def test_a_model_that_gives_no_logits_is_named() -> None:
    decoder = Decoder(predictor_from_logits(lambda xt: xt.float(), mask_id=3), mask_id=3)
    with pytest.raises(UserError, match=r"the model gave \(1, 2\); give logits, a tensor \(B, L, V\)"):
        decoder.decode(torch.tensor([[3, 0]]))


@pytest.mark.parametrize("settings", [{"alignment": "Same"}, {"confidence": "low"}], ids=str)
def test_a_denoiser_knows_its_words(model, settings: dict) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="unknown; use "):
        Denoiser(model.backbone, mask_id=3, **settings)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "settings", [{}, {"sampling": Sampling(1.0, top_p=0.9)}, {"remasking": P2(1.0)}, {"remasking": Rcr()}]
)
def test_a_model_that_gives_nan_is_not_decoded_from(settings: dict, bad: float) -> None:
    def model(xt: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*xt.shape, 5)
        logits[1, 3, 2] = bad if (xt[1] != 4).sum() == 2 else 0.0
        return logits

    decoder = Decoder(predictor_from_logits(model, 4), 4, rule=NumSteps(4), **settings)
    seen = []
    with pytest.raises(NotFinite, match="the model gives nan at position 3 of canvas 1, in step 3: its weights"):
        seen += decoder.steps(torch.full((2, 4), 4))
    assert len(seen) <= 3
