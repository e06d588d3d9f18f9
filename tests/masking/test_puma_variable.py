"""The pool for answers of any length against a row-by-row reading of it in plain Python, and what always holds."""

import math

import pytest
import torch
from torch import Tensor

from tests.helpers import RandomStream, random_stats
from unmask.masking.process import RowShard
from unmask.masking.puma_variable import VariablePumaPool
from unmask.masking.rows import PoolRows
from unmask.types import CleanBatch

MASK, EOS, ROWS = 6, 0, 10
SETTINGS = [
    {"tokens_per_step": 1, "threshold": None},
    {"tokens_per_step": 2, "threshold": 0.8},
    {"tokens_per_step": 50, "threshold": 0.9},  # more than there are
    {"tokens_per_step": 2, "threshold": 0.5, "eos_id": None},
    {"tokens_per_step": 1, "threshold": None, "confidence": "margin", "weight_cap": 1.5},
]


class Padded(RandomStream):
    """Answers of different lengths, each followed by end tokens alone (one is the first of its answer)."""

    def __getitem__(self, number: Tensor) -> CleanBatch:
        clean = super().__getitem__(number)
        position = torch.arange(self.length)
        end = clean.prompt_mask.sum(-1) + number % (self.length // 2)
        x0 = torch.where(clean.prompt_mask, clean.x0, clean.x0.clamp(min=1))
        return CleanBatch(
            x0=torch.where(~clean.prompt_mask & (position >= end.unsqueeze(1)), EOS, x0),
            prompt_mask=clean.prompt_mask,
        )


@pytest.fixture
def padded() -> Padded:
    return Padded(length=12, vocab_size=7)


def make(shard: RowShard | None = None, **settings: object) -> VariablePumaPool:
    return VariablePumaPool(mask_id=MASK, shard=shard or RowShard.whole(ROWS), seed=5, **({"eos_id": EOS} | settings))


def rows_of(process: VariablePumaPool) -> PoolRows:
    assert process.pool is not None
    return PoolRows(**{name: value.clone() for name, value in vars(process.pool).items()})


def answer_of(x0: list[int], is_prompt: list[bool], eos_id: int | None) -> list[int]:
    """Positions up to the first end token."""
    positions = [i for i, given in enumerate(is_prompt) if not given]
    ends = [i for i in positions if x0[i] == eos_id]
    return [i for i in positions if not ends or i <= ends[0]]


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_step_is_the_method_row_by_row(settings: dict, padded: Padded) -> None:
    process = make(**settings)
    num_done = 0
    for step in range(25):
        batch = process.next_batch(padded)
        before, stats = rows_of(process), random_stats(batch, step)
        process.observe(batch, stats)
        after = rows_of(process)
        confidence, top1 = batch.scatter(stats.confidence, -math.inf), batch.scatter(stats.top1, 0.0)
        for row in range(ROWS):
            masked = before.is_masked[row].nonzero().flatten().tolist()
            surest = sorted(masked, key=lambda position: -confidence[row, position])[: settings["tokens_per_step"]]
            threshold = settings["threshold"] or 2.0
            left = [i for i in masked if i not in surest and top1[row, i] <= threshold]
            assert after.is_masked[row].nonzero().flatten().tolist() == left
            answer = answer_of(before.x0[row].tolist(), before.prompt_mask[row].tolist(), settings.get("eos_id", EOS))
            assert bool(after.is_done[row]) == (not set(left) & set(answer))
        num_done += int(after.is_done.sum())
    assert num_done >= ROWS
    assert process.examples_seen + int(after.is_done.sum()) == ROWS + num_done


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_weight_is_that_of_the_visible_canvas(settings: dict, padded: Padded) -> None:
    """min(1/t, cap) / L_eff on what is masked of the answer, 0 on masked padding; no row is without a loss."""
    process, cap = make(**settings), settings.get("weight_cap", 5.0)
    for step in range(25):
        batch = process.next_batch(padded)
        rows, weight = rows_of(process), batch.scatter(batch.weight, 0.0)
        is_scored = batch.scatter(torch.ones_like(batch.weight), 0.0).bool()
        assert torch.equal(is_scored, rows.is_masked)  # padding too: it may be revealed
        assert (weight.sum(dim=1) > 0).all()
        for row in range(ROWS):
            masked = rows.is_masked[row].nonzero().flatten().tolist()
            length = int((~rows.prompt_mask[row]).sum())
            answer = answer_of(rows.x0[row].tolist(), rows.prompt_mask[row].tolist(), settings.get("eos_id", EOS))
            expected = min(length / len(masked), cap) / length
            assert weight[row, [i for i in masked if i in answer]].tolist() == pytest.approx(
                [expected] * len(set(masked) & set(answer))
            )
            assert weight[row].count_nonzero() == len(set(masked) & set(answer))
        process.observe(batch, random_stats(batch, step))


def test_new_rows_are_all_masked_but_those_of_the_first_pool(padded: Padded) -> None:
    process = make(tokens_per_step=3)
    batch = process.next_batch(padded)
    share = rows_of(process).num_revealed / rows_of(process).num_maskable
    assert share.min() == 0
    assert share.max() > 0.5
    process.observe(batch, random_stats(batch, 0))
    is_done = rows_of(process).is_done
    process.next_batch(padded)
    assert is_done.any()
    assert (rows_of(process).num_revealed[is_done] == 0).all()


def test_neither_reveals_nor_weights_tell_where_an_answer_ends(padded: Padded) -> None:
    """The same canvases with other hidden tokens, so other lengths: the first reveals and weights are the same."""

    class Longer(Padded):
        def __getitem__(self, number: Tensor) -> CleanBatch:
            clean = super().__getitem__(number)
            return CleanBatch(x0=torch.where(clean.prompt_mask, clean.x0, 3), prompt_mask=clean.prompt_mask)

    seen = []
    for stream in (padded, Longer(length=12, vocab_size=7)):
        process = make(tokens_per_step=2, threshold=0.8)
        process.pool = process._fresh_rows(stream[torch.arange(ROWS)], torch.arange(ROWS))
        batch = process._as_batch(process.pool)
        process.observe(batch, random_stats(batch, 0))
        weight = batch.scatter(batch.weight, 0.0)
        seen.append((rows_of(process).is_masked, weight.amax(dim=1)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*seen, strict=True))


def test_shards_make_up_the_whole(padded: Padded) -> None:
    whole = make(tokens_per_step=2)
    parts = [make(RowShard(total=ROWS, start=a, stop=b), tokens_per_step=2) for a, b in ((0, 4), (4, 10))]
    for step in range(15):
        batch, pieces = whole.next_batch(padded), [part.next_batch(padded) for part in parts]
        assert torch.equal(batch.xt, torch.cat([piece.xt for piece in pieces]))
        stats = random_stats(batch, step)
        confidence = batch.scatter(stats.confidence, 0.0)
        whole.observe(batch, stats)
        for part, piece, dense in zip(parts, pieces, confidence.split([4, 6]), strict=True):
            own = piece.gather(dense)
            part.observe(piece, type(stats)(nll=1 - own, confidence=own, top1=own))
