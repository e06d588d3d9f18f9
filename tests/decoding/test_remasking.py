from dataclasses import replace

import pytest
import torch

from tests.helpers import chi_square
from unmask import noise
from unmask.decoding.decoder import Decoder
from unmask.decoding.remasking import P2, REMASKINGS, Rcr, Remasking, RemdmCap, RemdmConfidence, RemdmRescale, Revealed
from unmask.decoding.sampling import Sampling
from unmask.noise import Purpose
from unmask.reveal import CosineSteps, NumSteps, RevealState
from unmask.types import Prediction, Query

MASK = 3


def state(num_masked: int, step: int, length: int = 12) -> RevealState:
    is_masked = torch.arange(length).unsqueeze(0) < num_masked
    return RevealState(
        score=torch.rand(1, length, dtype=torch.float64),
        eligible=is_masked,
        top1=torch.rand(1, length),
        entropy=None,
        step=torch.tensor([step]),
        num_masked=torch.tensor([num_masked]),
        num_masked_at_start=torch.tensor([length]),
    )


def revealed(now: RevealState, u: float = 0.0) -> Revealed:
    length = now.score.shape[1]
    return Revealed(
        is_revealed=~now.eligible,
        confidence=torch.linspace(0.1, 1, length, dtype=torch.float64).unsqueeze(0),
        log_prob=torch.linspace(-2, -1, length, dtype=torch.float64).unsqueeze(0),
        uniform=lambda: torch.full((1, length), u, dtype=torch.float64),
    )


@pytest.mark.parametrize("name", REMASKINGS)
@pytest.mark.parametrize("rule", [NumSteps(6), CosineSteps(6)])
def test_the_quota_is_kept_whatever_is_masked_again(name: str, rule: NumSteps) -> None:
    """And after the last step, nothing is masked."""
    seen: list[list[int]] = []
    table = torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def predict(xt: torch.Tensor, at: torch.Tensor, ask: Query) -> Prediction:
        seen.append((xt == MASK).sum(-1).tolist())
        shift = xt.sum(-1, keepdim=True).expand(xt.shape).flatten()[at]  # what is revealed changes the predictions
        return Prediction.from_logits(table[(at + shift) % 12], ask, mask_id=MASK)

    remasking: Remasking = REMASKINGS[name](1.0)
    decoder = Decoder(predict, MASK, rule=rule, sampling=Sampling(1.0), remasking=remasking)
    decoded = decoder.decode(torch.full((20, 12), MASK))
    steps = [state(12, k) for k in range(6)]
    expected = [12] + [int(rule.num_left_after(now)) for now in steps[:-1]]
    assert seen == [[n] * 20 for n in expected]
    assert (decoded.tokens != MASK).all()
    assert torch.equal(decoded.nfe, torch.full((20,), 6))


@pytest.mark.parametrize(
    ("remasking", "sigma"),
    [(RemdmCap(1.0), 4 / 6), (RemdmCap(0.3), 0.3), (RemdmRescale(0.5), 2 / 6)],
)
def test_the_share_that_is_masked_again(remasking: Remasking, sigma: float) -> None:
    """12 positions in 6 steps: in the fourth 6 are visible, and 4 of 12 are to be left, so sigma is at most 4/6."""
    now = state(6, step=3)
    for u, is_again in ((sigma - 1e-9, True), (sigma + 1e-9, False)):
        reveals, again = remasking(now, revealed(now, u), NumSteps(6))
        assert again.sum() == (4 if is_again else 0)  # all 6 are drawn, but only 4 are to be masked afterwards
        assert not (again & now.eligible).any()
        assert reveals.sum() == (6 if is_again else 2)


def test_doubted_tokens_are_masked_again_more_often() -> None:
    now = state(6, step=3)
    sigma = RemdmConfidence()._sigma(torch.tensor([[4 / 6]], dtype=torch.float64), revealed(now))[0]
    confidence = revealed(now).confidence[0, 6:]
    assert torch.allclose(sigma[6:], 4 / 6 * (-confidence).softmax(0))
    assert (sigma[:6] == 0).all()


def test_p2_keeps_the_likeliest_of_all() -> None:
    now = state(6, step=3)  # 8 of 12 are to be visible; log_prob rises with the position, and revealed are the last 6
    reveals, again = P2(1.0)(now, revealed(now), NumSteps(6))
    assert reveals[0].nonzero().flatten().tolist() == [4, 5]
    assert not again.any()
    doubted = revealed(now)
    doubted.log_prob[0, 7] = -9  # what the model no longer believes is masked again, and another takes its place
    reveals, again = P2(1.0)(now, doubted, NumSteps(6))
    assert reveals[0].nonzero().flatten().tolist() == [3, 4, 5]
    assert again[0].nonzero().flatten().tolist() == [7]
    assert not P2(0.0)(now, doubted, NumSteps(6))[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("remasking", [P2(0.0), Rcr(0.0), P2(1.0), Rcr(1.0)])
def test_nothing_is_masked_again_where_the_model_is_sure_of_all(remasking: Remasking, dtype: torch.dtype) -> None:
    now = state(6, step=3)
    sure = replace(revealed(now), log_prob=torch.zeros(1, 12, dtype=dtype))  # log p of 1 - 1e-20
    reveals, again = remasking(now, sure, NumSteps(6))
    assert not again.any()
    assert reveals.sum() == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("steps", [3, 5, 9])
def test_rcr_is_its_definition(temperature: float, steps: int) -> None:
    """As its paper has it: fill in all, then mask again those of lowest confidence, whenever they were filled in."""
    length, seed = 11, 3
    table = torch.randn(3, length, length, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    table[:2] *= 2

    def log_probs(xt: torch.Tensor) -> torch.Tensor:  # of one row (L,): what is visible changes all predictions
        is_visible, is_one = (xt != MASK)[:, None, None], (xt == 1)[:, None, None]
        logits = table[2, 0] + (table[0] * is_visible + table[1] * is_one).sum(0)
        logits[:, MASK] = -torch.inf
        return logits.log_softmax(-1)

    def predict(xt: torch.Tensor, at: torch.Tensor, ask: Query) -> Prediction:
        return Prediction.from_logits(torch.cat([log_probs(row) for row in xt])[at], ask, mask_id=MASK)

    start = torch.full((16, length), MASK)
    start[:, 0] = torch.arange(16) % 3
    start[8:, 4] = torch.arange(8) % 4  # some of them masked
    sampling = Sampling(temperature, seed=seed)
    decoded = Decoder(predict, MASK, rule=NumSteps(steps), sampling=sampling, remasking=Rcr()).decode(start)
    num_corrected = 0
    for number, given in enumerate(start):
        row, confidence, filled_in = given.clone(), torch.ones(length, dtype=torch.float64), torch.full((length,), -1)
        num_masked = int((given == MASK).sum())
        for step in range(steps):
            p = log_probs(row)
            values = p.argmax(-1)
            if temperature:
                place = torch.arange(length).unsqueeze(1)
                gumbel = noise.gumbel(seed, Purpose.VALUE, torch.full_like(place, number), step, place, torch.arange(4))
                values = (p / temperature + gumbel).argmax(-1)
            for i in (row == MASK).nonzero().flatten().tolist():
                row[i], confidence[i], filled_in[i] = values[i], p[i, values[i]].exp(), step
            num_left = num_masked - (step + 1) * num_masked // steps
            least = sorted((i for i in range(length) if given[i] == MASK), key=lambda i: float(confidence[i]))
            num_corrected += sum(filled_in[i] < step for i in least[:num_left])
            row[least[:num_left]] = MASK
        assert torch.equal(decoded.tokens[number], row)
        assert torch.equal(decoded.reveal_step[number], filled_in)
    assert num_corrected > 0


def test_a_decoder_can_correct_itself() -> None:
    """The first token is written blindly; once the second is there, P2 doubts the first and writes it anew."""

    def predict(xt: torch.Tensor, at: torch.Tensor, ask: Query) -> Prediction:
        row, place = at // 2, at % 2
        logits = torch.zeros(len(at), 4, dtype=torch.float64)
        logits[place == 0, 1] = 2.0
        logits[place == 1, 2] = torch.where(xt[row, 0] == 1, 5.0, 1.0)[place == 1].double()
        knows_second = (xt[row, 1] == 2) & (place == 0)
        logits[knows_second] = torch.tensor([8.0, 0.0, 0.0, 0.0], dtype=torch.float64)
        return Prediction.from_logits(logits, ask, mask_id=MASK)

    xt = torch.full((1, 2), MASK)
    assert Decoder(predict, MASK, rule=NumSteps(2)).decode(xt).tokens.tolist() == [[1, 2]]
    assert Decoder(predict, MASK, rule=NumSteps(6), remasking=P2(1.0)).decode(xt).tokens.tolist() == [[0, 2]]


@pytest.mark.parametrize(
    ("remasking", "passes"), [(P2(0.0), 2), (P2(1.0), 2), (Rcr(), 2), (RemdmCap(0.0), 2), (RemdmCap(1.0), 10)]
)
def test_a_row_ends_when_nothing_is_left_to_do(remasking: Remasking, passes: int) -> None:
    """Two masked positions in 10 steps: what changes nothing takes no pass, what is masked again takes all."""

    def predict(xt: torch.Tensor, at: torch.Tensor, ask: Query) -> Prediction:
        return Prediction.from_logits(torch.tensor([[3.0, 1.0, 0.0, 0.0]]).expand(len(at), 4), ask, mask_id=MASK)

    xt = torch.tensor([[1, MASK, 1, MASK]])
    decoded = Decoder(predict, MASK, rule=NumSteps(10), remasking=remasking).decode(xt)
    assert decoded.tokens.tolist() == [[1, 0, 1, 0]]
    assert decoded.nfe.tolist() == [passes]


@pytest.mark.parametrize("remasking", [RemdmCap(0.5), RemdmRescale(1.0), RemdmConfidence(1.0)])
def test_remasking_changes_no_marginal(remasking: Remasking) -> None:
    """Whether a token is masked again does not depend on which token it is: of independent positions, none is bent."""
    p = torch.tensor([0.6, 0.3, 0.1, 0.0], dtype=torch.float64)

    def predict(xt: torch.Tensor, at: torch.Tensor, ask: Query) -> Prediction:
        return Prediction.from_logits(p.log().expand(len(at), 4), ask, mask_id=MASK)

    decoder = Decoder(
        predict, MASK, order="random", rule=NumSteps(5), sampling=Sampling(1.0, seed=4), remasking=remasking
    )
    tokens = decoder.decode(torch.full((1500, 5), MASK)).tokens
    assert abs(chi_square(torch.bincount(tokens.flatten(), minlength=3).double(), p[:3] * 7500)) < 5
