"""The pool for answers of any length against a row-by-row reading of it in plain Python, and what always holds."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from tests.helpers import RandomStream, random_stats
from unmask.errors import UserError
from unmask.masking.pool_rows import PoolRows
from unmask.masking.process import RowShard
from unmask.masking.puma_variable import VariablePumaPool
from unmask.types import CleanBatch

MASK, EOS, ROWS = 6, 0, 10
SETTINGS = [
    {"tokens_per_step": 1, "threshold": None},
    {"tokens_per_step": 2, "threshold": 0.8},
    {"tokens_per_step": 50, "threshold": 0.9},  # more than there are
    {"tokens_per_step": 2, "threshold": 0.5, "eos_id": None},
    {"tokens_per_step": 1, "threshold": None, "confidence": "margin", "weight_cap": 1.5},
    {"tokens_per_step": 1, "threshold": 0.8, "block_size": 4},
    {"tokens_per_step": 2, "threshold": None, "factor": 1.0, "block_size": 3, "weight_cap": 2.0},
]
LENGTH = 12


def blocks(settings: dict) -> list[range]:
    """The positions of each."""
    size = settings.get("block_size", LENGTH)
    return [range(start, start + size) for start in range(0, LENGTH, size)]


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
    assert process.rows is not None
    return PoolRows(**{name: value.clone() for name, value in vars(process.rows).items()})


def answer_of(x0: list[int], is_prompt: list[bool], eos_id: int | None) -> list[int]:
    """Positions up to the first end token."""
    positions = [i for i, given in enumerate(is_prompt) if not given]
    ends = [i for i in positions if x0[i] == eos_id]
    return [i for i in positions if not ends or i <= ends[0]]


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_step_is_the_method_block_by_block(settings: dict, padded: Padded) -> None:
    process = make(**settings)
    num_done = 0
    for step in range(25):
        batch = process.next_batch(padded)
        before, stats = rows_of(process), random_stats(batch, step)
        process.observe(batch, stats)
        after = rows_of(process)
        confidence, top1 = batch.scatter(stats.confidence, -math.inf), batch.scatter(stats.top1, 0.0)
        for row, own in product(range(ROWS), blocks(settings)):
            masked = [i for i in own if before.is_masked[row, i]]
            ranked = sorted(masked, key=lambda i: -confidence[row, i])
            threshold = settings["threshold"] or 2.0
            if "factor" in settings:
                threshold = 2.0
                while ranked and (len(ranked) + 1) * (1 - top1[row, ranked[-1]]) >= settings["factor"]:
                    ranked.pop()  # confidence and top-1 are one here
            most_confident = {*sorted(masked, key=lambda i: -confidence[row, i])[: settings["tokens_per_step"]]}
            most_confident |= {*ranked} if "factor" in settings else set()
            left = [i for i in masked if i not in most_confident and top1[row, i] <= threshold]
            answer = answer_of(before.x0[row].tolist(), before.prompt_mask[row].tolist(), settings.get("eos_id", EOS))
            left = left if set(left) & set(answer) else []  # a block that is done is visible
            assert [i for i in own if after.is_masked[row, i]] == left
        assert torch.equal(after.is_done, ~after.is_masked.any(dim=1))
        num_done += int(after.is_done.sum())
    assert num_done >= ROWS
    assert process.examples_seen + int(after.is_done.sum()) == ROWS + num_done


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_weight_is_that_of_the_visible_canvas(settings: dict, padded: Padded) -> None:
    """min(1/t, cap) / L_eff, t a block's masked share, on what is masked of the answer, 0 on masked padding.

    No row is without a loss.
    """
    process, cap = make(**settings), settings.get("weight_cap", 5.0)
    for step in range(25):
        batch = process.next_batch(padded)
        rows, weight = rows_of(process), batch.scatter(batch.weight, 0.0)
        is_scored = batch.scatter(torch.ones_like(batch.weight), 0.0).bool()
        assert torch.equal(is_scored, rows.is_masked)  # padding too: it may be revealed
        assert (weight.sum(dim=1) > 0).all()
        for row in range(ROWS):
            answer = answer_of(rows.x0[row].tolist(), rows.prompt_mask[row].tolist(), settings.get("eos_id", EOS))
            row_length = int((~rows.prompt_mask[row]).sum())
            expected = torch.zeros(LENGTH, dtype=torch.float64)
            for own in blocks(settings):
                masked = [i for i in own if rows.is_masked[row, i]]
                length = sum(not rows.prompt_mask[row, i] for i in own)
                scored = [i for i in masked if i in answer]
                expected[scored] = min(length / max(1, len(masked)), cap) / row_length
            assert torch.allclose(weight[row], expected)
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
        process.rows = process.fresh_rows(stream[torch.arange(ROWS)], torch.arange(ROWS), num_blocks=1)
        batch = process.next_batch(stream)
        steps: list[dict] = []
        process.advance = lambda rows, stats, steps=steps, **step: steps.append(
            step
        )  # what follows shows finished rows
        process.observe(batch, random_stats(batch, 0))
        seen.append((steps[0]["reveal"], batch.scatter(batch.weight, 0.0).amax(dim=1)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*seen, strict=True))


def test_a_block_after_the_end_of_the_answer_has_nothing_to_learn(padded: Padded) -> None:
    process = make(tokens_per_step=1, threshold=None, block_size=3)
    rows = process.fresh_rows(padded[torch.arange(ROWS)], torch.arange(ROWS), num_blocks=4)
    num_after = 0
    for row, own in product(range(ROWS), range(4)):
        answer = answer_of(rows.x0[row].tolist(), rows.prompt_mask[row].tolist(), EOS)
        has_answer = bool({*range(3 * own, 3 * own + 3)} & set(answer))
        maskable = rows.in_blocks(~rows.prompt_mask)[row, own]
        assert torch.equal(rows.masked[row, own], maskable & has_answer)
        num_after += not has_answer
    assert num_after > 5


def test_a_row_that_would_never_be_done_is_refused() -> None:
    with pytest.raises(UserError, match=r"process.tokens_per_step=0: Input should be greater than or equal to 1"):
        make(tokens_per_step=0)
