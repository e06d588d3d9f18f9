import math
from itertools import product

import pytest
import torch
from torch import Tensor

from tests.helpers import RandomStream, random_stats
from tests.helpers.likelihood import nll
from unmask.errors import UserError
from unmask.masking.ar import NextToken
from unmask.masking.process import Requirements, RowShard
from unmask.models.build import build_denoiser
from unmask.models.transformer_config import TransformerConfig
from unmask.peers import Peers
from unmask.types import CleanBatch, TokenSpec

EOS = 5
CAUSAL = TransformerConfig(dim=16, ff_dim=24, num_layers=2, num_heads=2, causal=True, alignment="next")


def test_an_answer_ends_with_its_first_end_token() -> None:
    x0 = torch.tensor([[5, 1, 2, 5, 5, 5], [1, 1, 2, 3, 4, 1], [1, 5, 1, 1, 5, 1]])
    prompt_mask = torch.tensor([[True, False, False, False, False, False]] * 3)
    clean = CleanBatch(x0=x0, prompt_mask=prompt_mask)
    assert clean.answer_mask(EOS).int().tolist() == [[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0]]
    assert torch.equal(clean.answer_mask(None), ~prompt_mask)


def test_each_answer_of_a_row_ends_with_its_own_first_end_token() -> None:
    x0 = torch.tensor([[1, 2, 5, 5, 1, 5, 3, 5, 5], [1, 5, 5, 1, 2, 1, 1, 1, 2]])
    prompt_mask = torch.tensor([[1, 0, 0, 1, 1, 0, 1, 0, 0], [0, 0, 0, 1, 0, 1, 0, 0, 0]], dtype=torch.bool)
    expected = [[0, 1, 1, 0, 0, 1, 0, 1, 0], [1, 1, 0, 0, 1, 0, 1, 1, 1]]
    assert CleanBatch(x0=x0, prompt_mask=prompt_mask).answer_mask(EOS).int().tolist() == expected


def test_every_token_of_the_global_batch_counts_the_same(stream: RandomStream) -> None:
    process = NextToken(shard=RowShard.whole(16), eos_id=EOS)
    seen = []
    for step in range(3):
        batch = process.next_batch(stream)
        clean = stream[step * 16 + torch.arange(16)]
        is_scored = batch.scatter(torch.ones_like(batch.weight), 0.0).bool()
        assert torch.equal(is_scored, clean.answer_mask(EOS))
        assert torch.equal(batch.xt, clean.x0)
        weight = batch.weight[batch.weight > 0]
        assert len(weight.unique()) == 1
        assert weight.sum().item() == pytest.approx(16)  # the trainer divides by the rows
        process.observe(batch, random_stats(batch, step))
        seen.append(batch.x0)
    assert process.examples_seen == 48


class Counting(Peers):
    """The other one of two processes has so many tokens."""

    size = 2

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def sum(self, value: Tensor) -> Tensor:
        return value + self.tokens


def test_two_processes_share_the_batch_of_one(stream: RandomStream) -> None:
    whole = NextToken(shard=RowShard.whole(8), eos_id=EOS).next_batch(stream)
    counts = [int(stream[start + torch.arange(4)].answer_mask(EOS).sum()) for start in (0, 4)]
    stream.fetched.clear()
    parts = [
        NextToken(shard=RowShard(total=8, start=start, stop=start + 4, peers=Counting(others)), eos_id=EOS).next_batch(
            stream
        )
        for start, others in zip((0, 4), reversed(counts), strict=True)
    ]
    assert stream.fetched == list(range(8))  # each its own
    assert torch.equal(torch.cat([part.x0 for part in parts]), whole.x0)
    ours = torch.cat([part.scatter(part.weight, 0.0) for part in parts])
    assert torch.equal(ours, whole.scatter(whole.weight, 0.0))


def test_a_shard_that_knows_no_others_weighs_its_own_tokens(stream: RandomStream) -> None:
    """In a loop of one's own, where each process divides by its rows, the loss is the mean over its tokens."""
    process = NextToken(shard=RowShard(total=8, start=4, stop=8), eos_id=EOS)
    batch = process.next_batch(stream)
    assert batch.weight.sum().item() == pytest.approx(4)
    process.observe(batch, random_stats(batch, 0))
    assert process.examples_seen == 4


def test_the_probabilities_of_all_answers_sum_to_one() -> None:
    """Of all answers of four tokens; the NLL is that of the chain rule, so that nothing is lost or counted twice."""
    tokens = TokenSpec(vocab_size=4, length=5, mask_id=3)
    model = build_denoiser(CAUSAL, tokens, requirements=Requirements(is_causal=True), dtype="float64").eval()
    x0 = torch.tensor([[1, *rest] for rest in product(range(3), repeat=4)])
    prompt_mask = (torch.arange(5) < 1).expand(x0.shape)
    total = 0.0
    for row in range(len(x0)):
        clean = CleanBatch(x0=x0[row : row + 1], prompt_mask=prompt_mask[row : row + 1])
        total += math.exp(-4 * nll(model, clean, eos_id=None).value)
    assert total == pytest.approx(1, abs=1e-12)


def test_with_an_end_token_too() -> None:
    """Answers that have ended are one: of those that end early, what follows is not counted."""
    tokens = TokenSpec(vocab_size=4, length=5, mask_id=3, eos_id=0)
    model = build_denoiser(CAUSAL, tokens, dtype="float64").eval()
    answers = {rest[: rest.index(0) + 1] if 0 in rest else rest for rest in product(range(3), repeat=4)}
    total = 0.0
    for answer in answers:
        x0 = torch.tensor([[1, *answer, *[0] * (4 - len(answer))]])
        clean = CleanBatch(x0=x0, prompt_mask=(torch.arange(5) < 1).unsqueeze(0))
        total += math.exp(-4 * nll(model, clean, eos_id=0).value)
    assert total == pytest.approx(1, abs=1e-12)


def test_what_follows_changes_no_prediction() -> None:
    model = build_denoiser(CAUSAL, TokenSpec(vocab_size=9, length=12, mask_id=8), dtype="float64").eval()
    x = torch.randint(0, 8, (2, 12), generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 8
    at = torch.arange(1, 8)
    assert torch.equal(model.logits(x[:1], at), model.logits(other[:1], at))
    assert not torch.equal(model.logits(x[:1], at + 1), model.logits(other[:1], at + 1))


@pytest.mark.parametrize(
    ("requirements", "causal", "fix"),
    [(Requirements(is_causal=True), False, "model.causal=true"), (Requirements(), True, "model.causal=false")],
)
def test_a_process_gets_the_attention_that_it_needs(requirements: Requirements, causal: bool, fix: str) -> None:
    config = CAUSAL.model_copy(update={"causal": causal})
    with pytest.raises(UserError, match=f"set {fix}"):
        build_denoiser(config, TokenSpec(vocab_size=9, length=12, mask_id=8), requirements=requirements)


def test_a_causal_model_must_not_see_what_it_predicts() -> None:
    with pytest.raises(ValueError, match=r"set model\.alignment=next"):
        TransformerConfig(dim=16, ff_dim=24, num_layers=2, num_heads=2, causal=True)
