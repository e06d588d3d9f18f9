"""The head over chunks of the vocabulary is the plain one, in values and gradients, in less memory."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unmask import noise
from unmask.masking.process import masked_batch
from unmask.models import denoiser, head
from unmask.models.build import build_denoiser
from unmask.models.head import STREAMED, prediction, token_stats
from unmask.models.transformer_config import TransformerConfig
from unmask.noise import Purpose
from unmask.reveal import CONFIDENCES
from unmask.types import Prediction, Query, TokenSpec, TokenStats, at_least_fp32

M, D, V = 13, 8, 30
MASK_ID = 29
CHUNKS = (1, 7, 10, 29, 30, 1000)  # of one value; that divide V and do not; the mask token alone in the last; one chunk


def case(dtype: torch.dtype, mask_id: int = MASK_ID) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weights and targets, among them both ends of the vocabulary. Logits are of size 3."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (M, V))
    x0 = torch.randint(V, (M,), generator=generator)
    x0[:2] = torch.tensor([0, V - 1])
    x0 = torch.where(x0 == mask_id, (mask_id + 1) % V, x0)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), x0


def plain(hidden: Tensor, weight: Tensor, x0: Tensor, *, mask_id: int, confidence: str = "prob") -> TokenStats:
    logits = at_least_fp32(F.linear(hidden, weight))
    is_mask_token = torch.arange(len(weight)) == mask_id
    return TokenStats.from_logits(logits.masked_fill(is_mask_token, -torch.inf), x0, confidence=confidence)


def weights_with_padding(rows: int) -> Tensor:
    """Different ones; the first and the last are 0."""
    position = torch.arange(rows, dtype=torch.float64)
    return position * (rows - 1 - position) * (2 + position).rsqrt() / 10


def results(compute: Any, hidden: Tensor, weight: Tensor, x0: Tensor, **settings: Any) -> list[Tensor]:
    """The statistics, and the gradients of a sum in which padding has no weight."""
    stats = compute(hidden, weight, x0, **settings)
    row_weight = weights_with_padding(len(x0))
    gradients = torch.autograd.grad((stats.nll * row_weight).sum(), [hidden, weight])
    return [stats.nll, stats.confidence, stats.top1, *gradients]


def assert_equal(ours: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)


def test_every_confidence_is_here() -> None:
    assert list(STREAMED) == list(CONFIDENCES)


# Sums are taken in another order: a few rounding steps, 1e-16 and 6e-8, of values of about 10.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_it_is_the_plain_head(confidence: str, chunk: int, dtype: torch.dtype, tolerance: float) -> None:
    inputs, settings = case(dtype), {"mask_id": MASK_ID, "confidence": confidence}
    ours = results(token_stats, *inputs, **settings, chunk=chunk)
    assert_equal(ours, results(plain, *inputs, **settings), tolerance)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_under_autocast_it_is_as_near_to_the_truth_as_the_plain_head(confidence: str, chunk: int) -> None:
    """Both round logits to bfloat16, at steps of 2^-8 of up to 10; gradients here reach 10 as well.

    Logits from products of another shape may fall on the other side of a step.
    """
    inputs, settings = case(torch.float32), {"mask_id": MASK_ID, "confidence": confidence}
    with torch.autocast("cpu", torch.bfloat16):
        ours = results(token_stats, *inputs, **settings, chunk=chunk)
        rounded = results(plain, *inputs, **settings)
    assert_equal(ours, rounded, 10 * 2**-8)
    exact = results(plain, *inputs, **settings)
    errors = [torch.stack([(a - b).norm() for a, b in zip(got, exact, strict=True)]) for got in (ours, rounded)]
    assert (errors[0] <= 1.5 * errors[1] + 1e-3).all()


def test_autocast_leaves_fp64_alone_as_it_does_elsewhere() -> None:
    inputs = case(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(results(token_stats, *inputs, mask_id=3, chunk=7), results(plain, *inputs, mask_id=3), 1e-13)


@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("mask_id", range(V))
def test_the_mask_token_may_be_anywhere(mask_id: int, confidence: str) -> None:
    inputs, settings = case(torch.float64, mask_id), {"mask_id": mask_id, "confidence": confidence}
    ours = results(token_stats, *inputs, **settings, chunk=7)
    assert_equal(ours, results(plain, *inputs, **settings), 1e-13)
    assert (ours[-1][mask_id] == 0).all()


@pytest.mark.parametrize("target", [v for v in range(V) if v != MASK_ID])
def test_the_target_may_be_anywhere(target: int) -> None:
    hidden, weight, x0 = case(torch.float64)
    inputs = hidden, weight, torch.full_like(x0, target)
    assert_equal(
        results(token_stats, *inputs, mask_id=MASK_ID, chunk=7), results(plain, *inputs, mask_id=MASK_ID), 1e-13
    )


@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("scale", [0.0, 300.0])
def test_equal_and_extreme_logits(scale: float, confidence: str) -> None:
    """Nothing to choose between, also in one chunk; probabilities that round to 0 and 1, where log-sum-exp is 10^3."""
    hidden, weight, x0 = case(torch.float64)
    inputs = (hidden * scale).detach().requires_grad_(), weight, x0
    settings = {"mask_id": MASK_ID, "confidence": confidence}
    for chunk in CHUNKS:
        ours = results(token_stats, *inputs, **settings, chunk=chunk)
        assert_equal(ours, results(plain, *inputs, **settings), 1e-11)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_gradients_are_those_of_finite_differences(chunk: int) -> None:
    hidden, weight, x0 = case(torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: token_stats(h, w, x0, mask_id=5, chunk=chunk).nll, (hidden, weight))


def test_only_the_nll_has_a_gradient() -> None:
    hidden, weight, x0 = case(torch.float32)
    stats = token_stats(hidden, weight, x0, mask_id=MASK_ID, chunk=7)
    assert [stats.nll.requires_grad, stats.confidence.requires_grad, stats.top1.requires_grad] == [True, False, False]
    assert not token_stats(hidden.detach(), weight.detach(), x0, mask_id=MASK_ID).nll.requires_grad


def test_what_is_frozen_gets_no_gradient() -> None:
    hidden, weight, x0 = case(torch.float64)
    expected = results(plain, hidden, weight, x0, mask_id=MASK_ID)
    for frozen in (0, 1):
        inputs = [value.detach() if i == frozen else value for i, value in enumerate((hidden, weight))]
        stats = token_stats(*inputs, x0, mask_id=MASK_ID, chunk=7)
        (gradient,) = torch.autograd.grad((stats.nll * weights_with_padding(M)).sum(), [inputs[1 - frozen]])
        assert torch.allclose(gradient, expected[-1 - frozen], rtol=1e-13, atol=1e-13)


def test_rows_without_weight_leave_no_trace() -> None:
    hidden, weight, x0 = case(torch.float64)
    stats = token_stats(hidden, weight, x0, mask_id=MASK_ID, chunk=7)
    of_all = torch.autograd.grad(stats.nll[:5].sum(), [hidden, weight])
    first = token_stats(hidden[:5], weight, x0[:5], mask_id=MASK_ID, chunk=7)
    of_first = torch.autograd.grad(first.nll.sum(), [hidden, weight])
    for one, other in zip(of_all, of_first, strict=True):
        assert torch.allclose(one, other, rtol=1e-13, atol=1e-13)
    assert (of_all[0][5:] == 0).all()


def test_no_positions_at_all() -> None:
    hidden, weight, x0 = case(torch.float32)
    ours = results(token_stats, hidden[:0], weight, x0[:0], mask_id=MASK_ID, chunk=7)
    assert [len(value) for value in ours] == [0, 0, 0, 0, V]
    assert (ours[-1] == 0).all()


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() // leaf.itemsize for leaf in tree_leaves(out) if torch.is_tensor(leaf)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_all_logits_never_exist_at_once(confidence: str) -> None:
    """Not M x V, and nothing else above the weights' own gradient and a chunk."""
    rows, width, values = 50, 4, 1000
    hidden, weight = (torch.randn(n, width, requires_grad=True) for n in (rows, values))
    x0 = torch.randint(values - 1, (rows,))
    for compute, settings in ((token_stats, {"chunk": 100}), (plain, {})):
        with Largest() as largest, torch.autocast("cpu", torch.bfloat16):
            results(compute, hidden, weight, x0, mask_id=values - 1, confidence=confidence, **settings)
        if compute is token_stats:
            assert largest.elements <= max(rows * 100, values * width)
        else:
            assert largest.elements >= rows * values  # the instrument works


def perturb(logits: Tensor, row: Tensor, token: Tensor) -> Tensor:
    return logits / 2 + noise.gumbel(3, Purpose.VALUE, row[:, None], token)


def draw(logits: Tensor, row: Tensor) -> Tensor:
    """Of the three likeliest, which takes all tokens to know."""
    score = perturb(logits, row, torch.arange(logits.shape[1]))
    return score.masked_fill(logits < logits.topk(3).values[:, -1:], -torch.inf).argmax(dim=-1)


FORBIDDEN = torch.tensor([0, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 28])  # with a whole chunk of 7, of those of 10
GIVEN = torch.where(torch.arange(M) % 3 == 0, MASK_ID, torch.arange(M) * 2)
ASKS: dict[str, dict[str, Any]] = {
    "likeliest": {},
    "drawn": {"perturb": perturb},
    "entropy": {"has_entropy": True},
    "given": {"given": GIVEN},
    "forbidden": {"forbidden": FORBIDDEN},
    "nothing forbidden": {"forbidden": FORBIDDEN[:0]},
    "truncated": {"draw": draw},
    "all of it": {"perturb": perturb, "has_entropy": True, "given": GIVEN, "forbidden": FORBIDDEN},
}


def assert_same(ours: Prediction, expected: Prediction, tolerance: float = 1e-13) -> None:
    for name, value in vars(expected).items():
        found = getattr(ours, name)
        if value is None or not value.is_floating_point():
            assert (found is value) if value is None else torch.equal(found, value), name
        else:
            assert torch.allclose(found, value, rtol=tolerance, atol=tolerance), name


@pytest.mark.parametrize(
    ("kind", "confidence", "chunk"),
    [*product(["all of it"], CONFIDENCES, CHUNKS), *product(ASKS, ["prob", "neg_entropy"], [7, 10])],
)
def test_predictions_are_those_of_the_plain_logits(kind: str, confidence: str, chunk: int) -> None:
    """The likeliest values, drawn and given ones, their probabilities, and what orders them."""
    hidden, weight, _ = case(torch.float64)
    ask = Query(confidence=confidence, **ASKS[kind])
    ours = prediction(hidden, weight, ask, mask_id=MASK_ID, chunk=chunk)
    assert_same(ours, Prediction.from_logits(F.linear(hidden, weight), ask, mask_id=MASK_ID))


def test_what_was_asked_for_is_told() -> None:
    """The asks above are not empty words."""
    hidden, weight, _ = case(torch.float64)
    log_probs = F.linear(hidden, weight).index_fill(1, torch.tensor([MASK_ID]), -torch.inf).log_softmax(-1)

    def answer(kind: str) -> Prediction:
        return prediction(hidden, weight, Query(**ASKS[kind]), mask_id=MASK_ID, chunk=7)

    plain, drawn, entropy, given, forbidden = (answer(kind) for kind in list(ASKS)[:5])
    assert (drawn.values != plain.likeliest).any()
    assert plain.entropy is None
    assert entropy.entropy is not None
    assert torch.allclose(entropy.entropy, torch.special.entr(log_probs.exp()).sum(-1), rtol=1e-13)
    assert torch.equal(given.values, torch.where(GIVEN == MASK_ID, given.likeliest, GIVEN))
    assert torch.isin(plain.values, FORBIDDEN).any()
    assert not torch.isin(forbidden.values, FORBIDDEN).any()
    assert torch.equal(answer("all of it").log_prob == -torch.inf, torch.isin(GIVEN, FORBIDDEN))
    for found in (plain, drawn, given):
        assert torch.allclose(found.log_prob, log_probs.gather(1, found.values[:, None])[:, 0], rtol=1e-13)


@pytest.mark.parametrize("kind", ASKS)
def test_predictions_never_hold_all_logits(kind: str) -> None:
    rows, width, values = M, 4, 1000
    hidden, weight = (torch.randn(n, width) for n in (rows, values))
    with Largest() as largest:
        prediction(hidden, weight, Query(confidence="margin", **ASKS[kind]), mask_id=MASK_ID, chunk=100)
    assert largest.elements <= max(rows * 100, values * width)
    with Largest() as largest:
        Prediction.from_logits(F.linear(hidden, weight), Query(**ASKS[kind]), mask_id=MASK_ID)
    assert largest.elements >= rows * values  # the instrument works


def test_equal_logits_are_decided_alike() -> None:
    """For the lowest value, in one chunk or many."""
    hidden, weight = torch.ones(2, D), torch.ones(V, D)
    for chunk in CHUNKS:
        assert prediction(hidden, weight, Query(), mask_id=0, chunk=chunk).values.tolist() == [1, 1]


TOKENS = TokenSpec(vocab_size=101, length=12, mask_id=100)


@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_denoiser_with_many_values_is_the_plain_one(
    tied: bool, confidence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the head is tied, the embedding's gradient comes from both its uses."""
    model = build_denoiser(TransformerConfig(preset="tiny", tied_head=tied), TOKENS, seed=0, dtype="float64")
    model.confidence = confidence
    x0 = torch.randint(100, (4, 12), generator=torch.Generator().manual_seed(0))
    batch = masked_batch(x0, torch.where(x0 % 2 == 0, 100, x0), 100, torch.ones(4))
    calls = []
    monkeypatch.setattr(denoiser, "token_stats", lambda *a, **k: calls.append(1) or token_stats(*a, **k, chunk=30))
    found = []
    for threshold in (102, 101):
        monkeypatch.setattr(denoiser, "LARGE_VOCABULARY", threshold)
        model.zero_grad()
        stats = model(batch)
        (stats.nll * batch.weight).sum().backward()
        found.append([stats.nll, stats.confidence, stats.top1, *(p.grad.clone() for p in model.parameters())])
    assert calls == [1]
    assert_equal(found[1], found[0], 1e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_of_the_matrix_is_made_once(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd is handed the only reference to it, and keeps it as it is; the embedding's rows are added to it."""
    monkeypatch.setattr(denoiser, "LARGE_VOCABULARY", 101)
    monkeypatch.setattr(denoiser, "token_stats", lambda *a, **k: token_stats(*a, **k, chunk=30))
    model = build_denoiser(TransformerConfig(preset="tiny", tied_head=tied), TOKENS, seed=0)
    x0 = torch.randint(100, (4, 12), generator=torch.Generator().manual_seed(0))
    batch = masked_batch(x0, torch.where(x0 % 2 == 0, 100, x0), 100, torch.ones(4))
    loss = (model(batch).nll * batch.weight).sum()
    made = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if torch.is_tensor(out) and out.shape == model.backbone.head_weight.shape:
                made.append(out.data_ptr())
            return out

    with Made():
        loss.backward()
    weight = model.backbone.head_weight
    assert weight.grad is not None
    embeddings = {weight.grad.data_ptr(), model.backbone.embedding.weight.grad.data_ptr()}
    assert set(made) == embeddings
    assert len(embeddings) == (1 if tied else 2)


def test_a_chunk_is_smaller_than_what_counts_as_large() -> None:
    """Else a large vocabulary would pay for the second computation of its logits and save nothing."""
    assert 2 * head.CHUNK <= denoiser.LARGE_VOCABULARY
