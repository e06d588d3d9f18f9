import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unmask.decoding.decoder import Decoder
from unmask.masking.process import RowShard
from unmask.masking.puma import PumaPool
from unmask.reveal import CONFIDENCES, ORDERS, Fixed, RevealState, Steps, above, surest
from unmask.types import Ask, CleanBatch, Prediction, TokenStats


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
    chosen = surest(torch.tensor([score]).double(), torch.tensor([eligible]), torch.tensor([count]))
    by_score = sorted((-score[i], i) for i in range(len(score)) if eligible[i])  # equal scores: lower position first
    assert chosen[0].nonzero().flatten().tolist() == sorted(i for _, i in by_score[:count])


def test_above_is_strict_and_keeps_to_what_is_eligible() -> None:
    top1 = torch.tensor([[0.5, 0.9, 0.95, 0.99]])
    eligible = torch.tensor([[True, True, True, False]])
    assert above(top1, eligible, 0.9).tolist() == [[False, False, True, False]]


def run_rule(rule: Fixed | Steps, num_masked: int) -> list[int]:
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
    counts = run_rule(Steps(num_steps), num_masked)
    assert sum(counts) == num_masked
    assert len(counts) == min(num_steps, num_masked)
    assert max(counts) - min(counts) <= 1


@given(num_masked=st.integers(1, 60), per_step=st.integers(1, 70))
def test_fixed_reveals_the_same_number_each_step(num_masked: int, per_step: int) -> None:
    counts = run_rule(Fixed(per_step), num_masked)
    assert counts == [per_step] * (num_masked // per_step) + [num_masked % per_step] * (num_masked % per_step > 0)


def test_left_to_right_and_random_orders() -> None:
    confidence = torch.rand(2, 5)
    noise = torch.rand(2, 5)
    assert (
        ORDERS["left_to_right"].score(confidence, lambda: noise).argsort(descending=True).tolist()
        == [[0, 1, 2, 3, 4]] * 2
    )
    assert torch.equal(ORDERS["random"].score(confidence, lambda: noise), noise)


@pytest.mark.parametrize("order", ["prob", "margin", "neg_entropy", "left_to_right"])
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
    assert puma.pool is not None
    is_revealed = (batch.xt == mask_id) & ~puma.pool.is_masked
    assert is_revealed.any(dim=1).all()
    assert real.sum() == (batch.xt == mask_id).sum()

    def predict(xt: torch.Tensor, at: torch.Tensor, ask: Ask) -> Prediction:
        return Prediction.from_logits(table[at % length], ask, mask_id=mask_id)

    for row, count in enumerate(is_revealed.sum(dim=1).tolist()):
        decoder = Decoder(predict, mask_id, order=order, rule=Fixed(count))
        canvases = decoder.steps(batch.xt[row : row + 1])
        next(canvases)
        assert torch.equal(next(canvases).reveal_step[0] == 0, is_revealed[row])
