import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.decoding.decoder import Decoder
from unmask.masking.process import RowShard
from unmask.masking.puma import PumaPool
from unmask.reveal import (
    CONFIDENCES,
    ORDERS,
    PARALLEL_RULES,
    SCHEDULES,
    CosineSteps,
    EntropyBound,
    ErrorBudget,
    Factor,
    Fixed,
    NumSteps,
    RevealRule,
    RevealState,
    Threshold,
    most_confident,
)
from unmask.types import CleanBatch, Prediction, Query, TokenStats


@pytest.mark.parametrize(
    ("name", "expected"),
    [("prob", 0.7), ("margin", 0.5), ("neg_entropy", 0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1))],
)
def test_confidences_are_their_formulas(name: str, expected: float) -> None:
    log_probs = torch.tensor([[0.1, 0.7, 0.2, 0.0]], dtype=torch.float64).log()  # the mask token has no mass
    assert CONFIDENCES[name](log_probs).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", CONFIDENCES)
def test_surer_predictions_have_more_confidence(name: str) -> None:
    logits = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
    confidence = CONFIDENCES[name](logits.log_softmax(-1))
    assert (confidence.diff() > 0).all()


@given(
    score=st.lists(st.integers(-3, 3), min_size=1, max_size=12),
    eligible=st.lists(st.booleans(), min_size=12, max_size=12),
    count=st.integers(0, 14),
)
def test_surest_is_a_stable_sort(score: list[int], eligible: list[bool], count: int) -> None:
    eligible = eligible[: len(score)]
    chosen = most_confident(torch.tensor([score]).double(), torch.tensor([eligible]), torch.tensor([count]))
    by_score = sorted((-score[i], i) for i in range(len(score)) if eligible[i])  # equal scores: lower position first
    assert chosen[0].nonzero().flatten().tolist() == sorted(i for _, i in by_score[:count])


def test_above_is_strict_and_keeps_to_what_is_eligible() -> None:
    top1 = torch.tensor([[0.5, 0.9, 0.95, 0.99]])
    eligible = torch.tensor([[True, True, True, False]])
    zero = torch.zeros(1, dtype=torch.long)
    state = RevealState(
        score=top1,
        eligible=eligible,
        top1=top1,
        entropy=None,
        step=zero,
        num_masked=zero + 3,
        num_masked_at_start=zero + 3,
    )
    assert Threshold(0.9)(state).tolist() == [[False, False, True, False]]


def test_a_cosine_is_its_definition_in_float64() -> None:
    start = torch.arange(1, 2001)
    nothing = torch.empty(2000, 0)
    for num_steps in (1, 2, 3, 4, 6, 7, 30, 64):
        for step in range(num_steps):
            state = RevealState(
                score=nothing,
                eligible=nothing.bool(),
                top1=nothing,
                entropy=None,
                step=torch.full_like(start, step),
                num_masked=start,
                num_masked_at_start=start,
            )
            angle = torch.tensor((step + 1) * math.pi / (2 * num_steps), dtype=torch.float64)
            assert torch.equal(
                CosineSteps(num_steps).num_left_after(state), (start * (angle.cos() + 1e-9)).floor().long()
            )


def run_rule(rule: RevealRule, num_masked: int) -> list[int]:
    """How many positions each step reveals."""
    eligible = torch.ones(1, num_masked, dtype=torch.bool)
    counts = []
    while eligible.any():
        step = torch.tensor([len(counts)])
        state = RevealState(
            score=torch.rand(1, num_masked),
            eligible=eligible,
            step=step,
            top1=torch.zeros(1, num_masked),
            entropy=None,
            num_masked=eligible.sum(-1),
            num_masked_at_start=torch.tensor([num_masked]),
        )
        chosen = rule(state)
        counts.append(int(chosen.sum()))
        eligible = eligible & ~chosen
    return counts


@given(num_masked=st.integers(1, 60), num_steps=st.integers(1, 70))
def test_steps_spreads_the_reveals_evenly(num_masked: int, num_steps: int) -> None:
    counts = run_rule(NumSteps(num_steps), num_masked)
    assert sum(counts) == num_masked
    assert len(counts) == min(num_steps, num_masked)
    assert max(counts) - min(counts) <= 1


@given(num_masked=st.integers(1, 60), per_step=st.integers(1, 70))
def test_fixed_reveals_the_same_number_each_step(num_masked: int, per_step: int) -> None:
    counts = run_rule(Fixed(per_step), num_masked)
    assert counts == [per_step] * (num_masked // per_step) + [num_masked % per_step] * (num_masked % per_step > 0)


@settings(deadline=None)
@given(num_masked=st.integers(1, 60), num_steps=st.integers(1, 70))
def test_cosine_steps_are_as_many_and_start_with_few(num_masked: int, num_steps: int) -> None:
    counts = run_rule(CosineSteps(num_steps), num_masked)
    assert sum(counts) == num_masked
    assert len(counts) == min(num_steps, num_masked)
    done, most = 0, 0
    for step, count in enumerate(counts, start=1):
        cosine = math.cos(math.pi * step / (2 * num_steps)) + 1e-9  # that of 60 degrees is 1/2
        left = math.floor(num_masked * cosine)
        done, most = done + count, max(most + 1, num_masked - left)
        assert done == most  # the quota, but at least one a step
        assert done <= max(step, math.ceil(num_masked * step / num_steps))  # never ahead of even steps


def random_state(seed: int, shape: tuple[int, ...]) -> RevealState:
    """Numbers on a grid, so that sums are exact and some are equal; some rows have nothing eligible."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> torch.Tensor:
        return torch.randint(high + 1, shape, generator=generator).double() / 16

    top1 = draw(8) / 2 + 0.75
    eligible = draw(3) > 0
    return RevealState(
        score=top1 if seed % 2 else draw(8),  # the order `prob`, or another
        eligible=eligible,
        top1=top1.where(eligible, torch.nan),
        entropy=draw(8).where(eligible, torch.nan),
        step=torch.zeros(shape[:-1], dtype=torch.long),
        num_masked=eligible.sum(-1),
        num_masked_at_start=eligible.sum(-1),
    )


def by_definition(rule: RevealRule, score: list[float], top1: list[float], entropy: list[float]) -> set[int]:
    """What `rule` reveals of one row, all of it eligible."""
    ranked = sorted(range(len(score)), key=lambda i: (-score[i], i))
    prefixes = [ranked[:n] for n in range(1, len(ranked) + 1)]
    match rule:
        case Threshold(threshold):
            return {i for i in ranked if top1[i] > threshold} | set(ranked[:1])
        case Factor(factor):
            allowed = [p for p in prefixes if (len(p) + 1) * (1 - min(top1[i] for i in p)) < factor]
        case EntropyBound(gamma):
            allowed = [p for p in prefixes if sum(entropy[i] for i in p) - max(entropy[i] for i in p) <= gamma]
        case ErrorBudget(budget):
            allowed = [p for p in prefixes if sum(1 - top1[i] for i in p) < budget]
    return set(max(allowed, key=len, default=ranked[:1]))


SHAPES = [(4, 7), (3, 2, 5)]
AMOUNTS = st.integers(1, 20).map(lambda n: n / 16)


@settings(deadline=None)
@given(
    name=st.sampled_from(list(PARALLEL_RULES)), amount=AMOUNTS, seed=st.integers(0, 999), shape=st.sampled_from(SHAPES)
)
def test_rules_that_follow_the_certainty_are_their_definitions(
    name: str, amount: float, seed: int, shape: tuple[int, ...]
) -> None:
    """Row by row, in blocks or not; what is not eligible is not looked at."""
    rule = PARALLEL_RULES[name](min(1.0, amount) if name == "threshold" else amount)
    state = random_state(seed, shape)
    assert state.entropy is not None
    rows = (x.flatten(0, -2) for x in (rule(state), state.eligible, state.score, state.top1, state.entropy))
    for chosen, eligible, *values in zip(*rows, strict=True):
        at = eligible.nonzero().flatten()
        expected = by_definition(rule, *(value[at].tolist() for value in values))
        assert chosen.nonzero().flatten().tolist() == [int(at[i]) for i in sorted(expected)]


@settings(deadline=None)
@given(
    rule=st.sampled_from(
        [
            Fixed(1),
            Fixed(3),
            NumSteps(4),
            CosineSteps(4),
            Threshold(1.0),
            Factor(1e-9),
            EntropyBound(0.0),
            ErrorBudget(1e-9),
        ]
    ),
    seed=st.integers(0, 999),
    shape=st.sampled_from(SHAPES),
)
def test_every_rule_reveals_something_where_it_may_and_nothing_else(
    rule: RevealRule, seed: int, shape: tuple[int, ...]
) -> None:
    state = random_state(seed, shape)
    chosen = rule(state)
    assert torch.equal(chosen.any(-1), state.eligible.any(-1))
    assert not (chosen & ~state.eligible).any()


def test_every_rule_was_tried() -> None:
    assert {*PARALLEL_RULES.values()} == {Threshold, Factor, EntropyBound, ErrorBudget}
    assert {*SCHEDULES.values()} == {NumSteps, CosineSteps}


@settings(deadline=None)
@given(low=AMOUNTS, high=AMOUNTS, seed=st.integers(0, 999), shape=st.sampled_from(SHAPES))
def test_who_dares_more_reveals_more(low: float, high: float, seed: int, shape: tuple[int, ...]) -> None:
    """A lower threshold, a higher factor, a higher bound."""
    state = random_state(seed, shape)
    low, high = sorted((low, high))
    for less, more in (
        (Threshold(min(1.0, high)), Threshold(min(1.0, low))),
        (Factor(low), Factor(high)),
        (EntropyBound(low), EntropyBound(high)),
        (ErrorBudget(low), ErrorBudget(high)),
    ):
        assert not (less(state) & ~more(state)).any()


@pytest.mark.parametrize(("entropy", "count"), [([0.3, 0.2, 0.1], 1), ([0, 0.2, 0, 0, 0.1], 4), ([0, 0], 2)])
def test_a_bound_of_nothing_reveals_what_is_certain_and_one_more(entropy: list[float], count: int) -> None:
    h = torch.tensor([entropy]).double()
    state = RevealState(
        score=-h,
        eligible=torch.ones_like(h, dtype=torch.bool),
        top1=h,
        entropy=h,
        step=torch.tensor([0]),
        num_masked=torch.tensor([len(entropy)]),
        num_masked_at_start=torch.tensor([len(entropy)]),
    )
    ranked = sorted(range(len(entropy)), key=lambda i: (entropy[i], i))
    assert EntropyBound(0.0)(state)[0].nonzero().flatten().tolist() == sorted(ranked[:count])


def test_left_to_right_and_random_orders() -> None:
    confidence = torch.rand(2, 5)
    noise = torch.rand(2, 5)
    assert (
        ORDERS["left_to_right"].score(confidence, lambda: noise).argsort(descending=True).tolist()
        == [[0, 1, 2, 3, 4]] * 2
    )
    assert (
        ORDERS["right_to_left"].score(confidence, lambda: noise).argsort(descending=True).tolist()
        == [[4, 3, 2, 1, 0]] * 2
    )
    assert torch.equal(ORDERS["random"].score(confidence, lambda: noise), noise)


@pytest.mark.parametrize("order", ["prob", "margin", "neg_entropy", "left_to_right", "right_to_left"])
def test_training_and_decoding_reveal_the_same_positions(order: str) -> None:
    """One model, one canvas: what PUMA's pool reveals is what the decoder reveals when asked for as many."""
    length, mask_id = 9, 5
    table = torch.randn(length, mask_id + 1).index_fill(1, torch.tensor([mask_id]), -math.inf)

    class Examples:
        epoch_size = 100

        def __getitem__(self, number: torch.Tensor) -> CleanBatch:
            x0 = torch.randint(mask_id, (len(number), length))
            return CleanBatch(x0=x0, prompt_mask=torch.zeros_like(x0, dtype=torch.bool))

    puma = PumaPool(mask_id=mask_id, shard=RowShard.whole(20), num_stages=3, confidence=order)
    batch = puma.next_batch(Examples())
    logits = table[batch.scored % length]
    real = batch.scored < batch.x0.numel()
    stats = TokenStats.from_logits(logits, batch.gather(batch.x0), confidence=puma.requirements.confidence)
    puma.observe(batch, stats)
    assert puma.rows is not None
    is_revealed = (batch.xt == mask_id) & ~puma.rows.is_masked
    assert is_revealed.any(dim=1).all()
    assert real.sum() == (batch.xt == mask_id).sum()

    def predict(xt: torch.Tensor, at: torch.Tensor, ask: Query) -> Prediction:
        return Prediction.from_logits(table[at % length], ask, mask_id=mask_id)

    for row, count in enumerate(is_revealed.sum(dim=1).tolist()):
        decoder = Decoder(predict, mask_id, order=order, rule=Fixed(count))
        canvases = decoder.steps(batch.xt[row : row + 1])
        next(canvases)
        assert torch.equal(next(canvases).reveal_step[0] == 0, is_revealed[row])
