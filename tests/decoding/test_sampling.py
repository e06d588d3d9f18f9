"""Values are drawn from the distribution that was asked for, however the logits are come by."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import chi_square
from unmask import noise
from unmask.decoding import sampling as sampling_module
from unmask.decoding.config import DecodeConfig
from unmask.decoding.sampling import Sampling
from unmask.decoding.truncation import truncated
from unmask.models.head import prediction
from unmask.noise import Purpose
from unmask.types import Prediction

V, MASK = 12, 11
SAMPLINGS = [
    Sampling(temperature=0.7),
    Sampling(temperature=0.7, top_k=3),
    Sampling(temperature=1.5, top_p=0.6),
    Sampling(temperature=1.5, top_k=4, top_p=0.8, forbidden=(2, 5)),
    Sampling(temperature=1.0, forbidden=(0, 1, 2, 3, 4)),
    Sampling(temperature=0.0, forbidden=(3, 7)),
]


def case(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (rows, V))
    return hidden / 4, weight  # no value is out of the question


def keys(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    row = torch.arange(rows)
    return row // 4, row % 3, row


def allowed(logits: list[float], top_k: int | None, top_p: float | None) -> set[int]:
    """By the definition."""
    ranked = sorted(range(len(logits)), key=lambda v: (-logits[v], v))
    total = math.fsum(math.exp(x) for x in logits)
    count, mass = 0, 0.0
    while count < len(ranked) and (top_p is None or mass < top_p):
        mass += math.exp(logits[ranked[count]]) / total
        count += 1
    return set(ranked[: min(count, top_k or count)])


@settings(deadline=None)
@given(
    logits=st.lists(st.integers(-3, 3), min_size=1, max_size=9),
    top_k=st.none() | st.integers(1, 10),
    top_p=st.none() | st.integers(1, 99).map(lambda n: n / 100 + 1e-5),  # where no sum of probabilities falls
)
def test_truncated_is_its_definition(logits: list[int], top_k: int | None, top_p: float | None) -> None:
    rows = torch.tensor([logits, logits[::-1]]).double()
    found = truncated(rows, top_k, top_p)
    for row, kept in zip(rows, found > -torch.inf, strict=True):
        assert set(kept.nonzero().flatten().tolist()) == allowed(row.tolist(), top_k, top_p)
    assert torch.equal(torch.where(found > -torch.inf, found, rows), rows)


@pytest.mark.parametrize("sampling", SAMPLINGS[:-1])
def test_draws_follow_the_truncated_softmax(sampling: Sampling) -> None:
    hidden, weight = case(1)
    draws = 4000
    logits = F.linear(hidden, weight)[0]
    values = Prediction.from_logits(logits.expand(draws, V), sampling.query(*keys(draws)), mask_id=MASK).values
    never = [MASK, *sampling.forbidden]
    tempered = (logits / sampling.temperature).index_fill(0, torch.tensor(never), -torch.inf)
    kept = sorted(allowed(tempered.tolist(), sampling.top_k, sampling.top_p) - set(never))
    counts = torch.bincount(values, minlength=V).double()
    assert counts[kept].sum() == draws
    assert len(kept) < V - len(never) or sampling.top_k is sampling.top_p is None
    expected = tempered[kept].softmax(0) * draws
    assert expected.min() > 5
    assert abs(chi_square(counts[kept], expected)) < 5


@pytest.mark.parametrize("limits", [{"top_k": 3}, {"top_p": 0.5}, {"top_k": 2000}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [9, 2048])
def test_near_zero_a_temperature_draws_the_likeliest(size: int, dtype: torch.dtype, limits: dict[str, Any]) -> None:
    logits = torch.randn(20, size, generator=torch.Generator().manual_seed(0), dtype=dtype) * 10
    for temperature in (1e-30, 1e-37, 1e-300):
        query = Sampling(temperature, **limits).query(*keys(20))
        values = Prediction.from_logits(logits, query, mask_id=size - 1).values
        assert values.equal(logits[:, :-1].argmax(dim=-1))


@pytest.mark.parametrize("spacing", [1.0, 0.25, None])  # of the logits: many are equal
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "limits",
    [
        {"top_k": 1},
        {"top_k": 9},
        {"top_k": 90},
        {"top_p": 1e-5},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_k": 20, "top_p": 0.6},
        {"top_k": 150, "top_p": 0.9999},
    ],
)
@pytest.mark.parametrize("few", [0, 1024])  # whether bins are made, or all is sorted
def test_a_draw_is_the_best_of_all_that_is_kept(
    limits: dict[str, float], dtype: torch.dtype, spacing: float | None, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By brute force: the noise of all tokens is added, and those beyond the limits are left out."""
    monkeypatch.setattr(sampling_module, "_FEW", few)
    rows, size = 60, 200
    logits = torch.randn(rows, size, generator=torch.Generator().manual_seed(1), dtype=dtype)
    if spacing is not None:
        logits = (logits / spacing).round() * spacing
    logits[:10] = 0.5  # nothing to tell them apart
    logits[20:30] *= 8  # most of the mass is that of a few
    logits[:, [MASK, 100]] = torch.tensor([-torch.inf, torch.finfo(torch.float32).min], dtype=dtype)
    sampling, own = Sampling(0.8, seed=3, **limits), keys(rows)
    draw = sampling.query(*own).draw
    assert draw is not None
    found = draw(logits, torch.arange(rows))
    drawn = noise.gumbel(3, Purpose.VALUE, *(key.unsqueeze(1) for key in own), torch.arange(size))
    kept = truncated(logits.double() / 0.8, sampling.top_k, sampling.top_p)
    assert torch.equal(found, (kept + drawn).argmax(dim=-1))


class Work(TorchDispatchMode):
    """Counts the values that are sorted, those of the head that are read, and the logarithms that are taken."""

    num_sorted = num_read = num_logs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.sort, torch.ops.aten.argsort):
            self.num_sorted += args[0].numel()
        if func.overloadpacket is torch.ops.aten.mm:
            self.num_read += args[0].numel()
        if func.overloadpacket is torch.ops.aten.log and args[0].dtype == torch.float64:
            self.num_logs += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("limits", [{"top_k": 50}, {"top_k": 15_000}, {"top_p": 0.5}, {"top_p": 0.99}])
def test_limits_cost_little(limits: dict[str, float]) -> None:
    """Of a large vocabulary next to nothing is sorted or gets noise, and the head is read once."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(30, 32, generator=generator), torch.randn(20_000, 32, generator=generator) / 4
    with Work() as work:
        prediction(hidden, weight, Sampling(1.0, **limits).query(*keys(30)), mask_id=0)
    assert work.num_sorted <= 2 * len(weight)
    assert work.num_read == weight.numel()
    assert 0 < work.num_logs <= 0.05 * 30 * len(weight)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_the_streamed_head_draws_the_same(sampling: Sampling, chunk: int) -> None:
    hidden, weight = case(40)
    query = sampling.query(*keys(40), confidence="margin", has_entropy=True)
    ours = prediction(hidden, weight, query, mask_id=MASK, chunk=chunk)
    plain = Prediction.from_logits(F.linear(hidden, weight), query, mask_id=MASK)
    assert torch.equal(ours.values, plain.values)
    assert torch.allclose(ours.log_prob, plain.log_prob, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_what_orders_the_reveals_is_the_models(sampling: Sampling) -> None:
    """Only what is forbidden changes it: that has probability 0."""
    hidden, weight = case(40)
    logits = F.linear(hidden, weight)
    answer = Prediction.from_logits(logits, sampling.query(*keys(40), has_entropy=True), mask_id=MASK)
    assert answer.entropy is not None
    p = logits.index_fill(1, torch.tensor([MASK, *sampling.forbidden]), -torch.inf).softmax(-1)
    assert torch.allclose(answer.top1, p.amax(-1), rtol=1e-13)
    assert torch.allclose(answer.confidence, p.amax(-1), rtol=1e-13)
    assert torch.allclose(answer.entropy, torch.special.entr(p).sum(-1), rtol=1e-13)
    assert torch.allclose(answer.log_prob.exp(), p.gather(1, answer.values[:, None])[:, 0], rtol=1e-13)
    given = torch.full((40,), sampling.forbidden[0] if sampling.forbidden else MASK)
    of_given = Prediction.from_logits(logits, sampling.query(*keys(40), given=given), mask_id=MASK)
    assert (of_given.log_prob == -torch.inf).all() == bool(sampling.forbidden)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_draw_does_not_depend_on_its_batch(sampling: Sampling, is_streamed: bool) -> None:
    hidden, weight = case(40)
    logits = torch.stack([F.linear(row, weight) for row in hidden])  # the same bits alone and together

    def values(rows: Tensor) -> Tensor:
        query = sampling.query(*(key[rows] for key in keys(40)))
        if is_streamed:  # of logits, in fp64, that one product gives as they are
            return prediction(logits[rows], torch.eye(V).double(), query, mask_id=MASK, chunk=5).values
        return Prediction.from_logits(logits[rows], query, mask_id=MASK).values

    together = values(torch.arange(40))
    for rows in (torch.tensor([7]), torch.tensor([30, 2, 7]), torch.arange(39, -1, -1)):
        assert torch.equal(values(rows), together[rows])
    assert sampling.temperature == 0 or len(values(torch.arange(40)).unique()) > 1


def test_from_config_reads_all_settings() -> None:
    config = DecodeConfig(temperature=0.5, seed=3, top_k=4, top_p=0.5, forbid=[5, 2])
    assert Sampling.from_config(config) == Sampling(0.5, 3, 4, 0.5, (2, 5))
    assert Sampling.from_config(DecodeConfig()) == Sampling()
