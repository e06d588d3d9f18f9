"""Scores are the likelihood or its bound, by brute force; they depend on nothing but the pair, its key and the seed."""

import math
import statistics
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch

from unmask.errors import UserError
from unmask.evaluation.continuations import Pair, Score, cut_windows, score_pairs
from unmask.models.build import build_denoiser
from unmask.models.denoiser import Denoiser
from unmask.models.transformer_config import TransformerConfig
from unmask.types import MaskedBatch, TokenSpec, TokenStats

VALUES, LENGTH, MASK = 7, 12, 7


def tiny(**settings: object) -> Denoiser:
    """A random model with confident predictions."""
    config = TransformerConfig.model_validate({"dim": 16, "ff_dim": 16, "num_layers": 1, "num_heads": 2, **settings})
    model = build_denoiser(
        config, TokenSpec(vocab_size=VALUES + 1, length=LENGTH, mask_id=MASK), dtype="float64"
    ).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, dtype=weight.dtype) * 0.3)
    return model


def log_probs(model: Denoiser, row: list[int], at: list[int]) -> torch.Tensor:
    logits = model.logits(torch.tensor([row]), torch.tensor(at))
    return logits.log_softmax(dim=-1)


@torch.no_grad()
def bound(model: Denoiser, pair: Pair) -> float:
    """The mean over n and over the sets of n masked positions of (L / n) times their log-probability."""
    size, start = len(pair.continuation), len(pair.context)
    total = 0.0
    for n in range(1, size + 1):
        sets = list(combinations(range(size), n))
        for places in sets:
            row = [*pair.context, *(MASK if i in places else v for i, v in enumerate(pair.continuation))]
            found = log_probs(model, row, [start + i for i in places])
            total += sum(found[k, pair.continuation[i]].item() for k, i in enumerate(places)) / n / len(sets)
    return total


def score(model: Denoiser, *pairs: Pair, **options: int) -> list[Score]:
    return score_pairs(model, pairs, length=LENGTH, **options)


PAIR = Pair((1, 2, 3), (4, 0, 6, 5), key=11)


@pytest.mark.parametrize("alignment", ["same", "next"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_few_masks_are_all_taken(alignment: str, size: int) -> None:
    pair, model = replace(PAIR, continuation=PAIR.continuation[:size]), tiny(alignment=alignment)
    (found,) = score(model, pair, draws=15)
    assert found.value == pytest.approx(bound(model, pair), abs=1e-12)
    assert found.stderr == 0.0
    assert found.passes == 2**size - 1


def test_draws_are_unbiased_and_their_error_is_stated() -> None:
    model = tiny()
    found = score(model, *(replace(PAIR, key=key) for key in range(400)), draws=6)
    values, errors = [each.value for each in found], [each.stderr or 0.0 for each in found]
    spread = statistics.stdev(values)
    assert statistics.mean(values) == pytest.approx(bound(model, PAIR), abs=4 * spread / 20)  # 4 standard errors
    assert 0.7 < math.sqrt(statistics.mean(error**2 for error in errors)) / spread < 2.5  # never far too small
    assert all(each.passes <= 6 for each in found)


def test_a_mask_that_is_drawn_again_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 15 masks of 4 tokens, 14 draws have the one of all tokens 3 times at least; each draw counts."""
    model, rows = tiny(), list[tuple[int, ...]]()
    forward = model.forward

    def recorded(batch: MaskedBatch) -> TokenStats:
        rows.extend(map(tuple, batch.xt.tolist()))
        return forward(batch)

    monkeypatch.setattr(model, "forward", recorded)
    (found,) = score(model, PAIR, draws=14)
    assert len(rows) == len(set(rows)) == found.passes <= 12
    (every,) = score(model, PAIR, draws=15)
    assert every.passes == 15
    many = score(model, *(replace(PAIR, key=key) for key in range(200)), draws=14)
    values = [each.value for each in many]
    assert statistics.mean(values) == pytest.approx(every.value, abs=4 * statistics.stdev(values) / math.sqrt(200))


@torch.no_grad()
def test_a_causal_model_is_exact() -> None:
    model = tiny(causal=True, alignment="next")
    row = [*PAIR.context, *PAIR.continuation]
    found = log_probs(model, row, list(range(3, 7)))
    expected = sum(found[k, value].item() for k, value in enumerate(PAIR.continuation))
    (own,) = score(model, PAIR)
    assert own.value == pytest.approx(expected, abs=1e-12)
    assert own == replace(own, stderr=0.0, passes=1)


@torch.no_grad()
def test_blocks_of_one_are_the_chain_rule() -> None:
    model = tiny(block_size=1)
    expected = 0.0
    for i, value in enumerate(PAIR.continuation):
        row = [*PAIR.context, *PAIR.continuation[:i], MASK]
        expected += log_probs(model, row, [3 + i])[0, value].item()
    (own,) = score(model, PAIR)
    assert own.value == pytest.approx(expected, abs=1e-12)
    assert own == replace(own, stderr=0.0, passes=1)


@torch.no_grad()
def test_blocks_are_summed() -> None:
    """Blocks of two: the continuation begins in the middle of one, and ends in the middle of another."""
    model = tiny(block_size=2)
    pair = Pair((1, 2, 3), (4, 0, 6, 5), key=3)
    row = [1, 2, 3, 4, 0, 6, 5, MASK]
    expected = log_probs(model, [1, 2, 3, MASK], [3])[0, 4].item()
    for n, places in ((1, (4,)), (1, (5,)), (2, (4, 5))):
        masked = [MASK if i in places else value for i, value in enumerate(row[:6])]
        found = log_probs(model, masked, list(places))
        expected += sum(found[k, row[i]].item() for k, i in enumerate(places)) / n / (2 if n == 1 else 1)
    expected += log_probs(model, [*row[:6], MASK, MASK], [6])[0, 5].item()
    assert score(model, pair)[0].value == pytest.approx(expected, abs=1e-12)


def test_a_score_depends_on_its_pair_key_and_seed_alone() -> None:
    model = tiny()
    others = [replace(PAIR, context=(5,) * n, key=n) for n in range(1, 5)]
    alone = [score(model, pair, draws=4)[0] for pair in (PAIR, *others)]
    together = score(model, *others, PAIR, draws=4)
    assert [each.value for each in (together[-1], *together[:-1])] == pytest.approx([each.value for each in alone])
    assert score(model, PAIR, draws=4, seed=1)[0].value != alone[0].value
    assert score(model, replace(PAIR, key=12), draws=4)[0].value != alone[0].value


def test_choices_get_the_same_masks() -> None:
    """Two choices that the model cannot tell apart have equal scores, though few masks are drawn."""
    model = tiny(tied_head=True)
    with torch.no_grad():
        model.backbone.embedding.weight[6] = model.backbone.embedding.weight[4]
    one, two = (replace(PAIR, continuation=(4, 0, value, 5, 1)) for value in (4, 6))
    first, second = score(model, one, two, draws=3)
    assert first.value == pytest.approx(second.value, abs=1e-12)


def test_long_contexts_lose_their_beginning() -> None:
    model = tiny()
    long = replace(PAIR, context=(0, 1, 5, 6, *(2,) * 7, 3))
    assert score(model, long)[0].value == score(model, replace(long, context=long.context[-8:]))[0].value


def test_windows_predict_every_token_once() -> None:
    ids = list(range(2, 31))
    for start in ((), (1,)):
        windows = cut_windows(ids, start, 8)
        assert [i for window in windows for i in window.continuation] == ids
        assert all(len(window.context) + len(window.continuation) <= 8 for window in windows)
        assert windows[0].context == start
        assert all(b.context == (a.continuation[-1],) for a, b in pairwise(windows))
        assert len({window.key for window in windows}) == len(windows)


@pytest.mark.parametrize(
    ("pair", "alignment", "message"),
    [
        (Pair((1,), ()), "same", "continuation 1: is empty"),
        (Pair((1,), (2,) * 13), "same", "has 13 tokens, and the model reads 12"),
        (Pair((), (2,)), "next", "nothing stands before it"),
        (Pair((1,), (2, MASK)), "same", "holds the mask token"),
        (Pair((MASK,), (2,)), "same", "holds the mask token"),
    ],
)
def test_bad_pairs(pair: Pair, alignment: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score(tiny(alignment=alignment), pair)
