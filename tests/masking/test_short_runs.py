"""Pools of short runs, between uniform masks and PUMA: `start` and `run`."""

from typing import Any

import pytest
import torch

from tests.helpers import RandomStream, random_stats
from tests.helpers.runs import toy_trainer
from unmask.masking.pool import Pool
from unmask.masking.process import RowShard
from unmask.masking.puma import PumaPool
from unmask.masking.puma_variable import VariablePumaPool
from unmask.masking.uniform import RandomMasking


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("density", ["uniform", {"name": "truncated_normal", "mean": 0.3}])
def test_runs_of_one_step_are_random_masks(block_size: int | None, density: Any) -> None:
    shard, stream = RowShard.whole(10), RandomStream(length=12, vocab_size=11)
    pool = PumaPool(mask_id=11, shard=shard, seed=3, start=density, run=1, threshold=0.5, block_size=block_size)
    random = RandomMasking(mask_id=11, shard=shard, seed=3, time=density, block_size=block_size)
    for step in range(5):
        ours, expected = pool.next_batch(stream), random.next_batch(stream)
        for name in ("x0", "xt", "scored", "weight"):
            assert torch.equal(getattr(ours, name), getattr(expected, name)), name
        for process, batch in ((pool, ours), (random, expected)):
            process.observe(batch, random_stats(batch, step))
    assert pool.examples_seen == random.examples_seen == 50


def test_runs_of_one_step_are_random_masks_for_a_model_that_is_told_its_estimate() -> None:
    """Such rows never come back, so that only a first pass tells it one."""
    settings = ("model.self_conditioning=true", "train.compile=false")
    ours = toy_trainer(*settings, "process={name: puma, run: 1, start: uniform}")
    random = toy_trainer(*settings, "process={name: uniform}")
    steps = [(ours.step(), random.step()) for _ in range(8)]
    assert [own.loss.item() for own, _ in steps] == [other.loss.item() for _, other in steps]
    assert sum(own.passes for own, _ in steps) == sum(other.passes for _, other in steps) > 8
    assert ours.model.backbone.conditioning.weight.any()


@pytest.mark.parametrize(
    ("kind", "settings", "is_carried"),
    [
        (PumaPool, {"num_stages": 2}, True),
        (PumaPool, {"num_stages": 1}, False),
        (PumaPool, {"run": 1}, False),
        (VariablePumaPool, {"tokens_per_step": 4}, True),
        (VariablePumaPool, {"tokens_per_step": 4, "block_size": 4}, False),
    ],
)
def test_only_rows_that_come_back_are_marked_so(kind: type[Pool], settings: dict[str, Any], is_carried: bool) -> None:
    pool, stream = kind(mask_id=11, shard=RowShard.whole(4), **settings), RandomStream(length=12, vocab_size=11)
    for step in range(4):
        batch = pool.next_batch(stream)
        assert batch.is_carried == is_carried
        assert pool.rows is not None
        assert is_carried or step == 0 or not pool.rows.visit.any()
        pool.observe(batch, random_stats(batch, step))


def test_rows_come_back_from_the_step_on_that_gives_them_a_second_stage() -> None:
    pool = PumaPool(mask_id=11, shard=RowShard.whole(4), num_stages=1, stage_schedule=[[2, 3]])
    stream, found = RandomStream(length=12, vocab_size=11), []
    for step in range(4):
        batch = pool.next_batch(stream)
        found.append(batch.is_carried)
        pool.observe(batch, random_stats(batch, step))
    assert found == [False, False, True, True]


def test_no_row_stays_longer_than_its_run_and_the_first_leave_one_after_the_other() -> None:
    rows, run = 12, 3
    pool = PumaPool(mask_id=11, shard=RowShard.whole(rows), num_stages=8, start="uniform", run=run)
    stream = RandomStream(length=64, vocab_size=11)
    for step in range(12):
        batch = pool.next_batch(stream)
        assert pool.rows is not None
        is_last = pool.rows.visit == run - 1
        assert pool.rows.visit.max() < run
        assert step >= run or is_last.sum() <= 2 * rows // run
        pool.observe(batch, random_stats(batch, step))
        assert pool.rows.is_done[is_last].all()


def test_in_runs_every_block_is_at_the_stage_of_its_visit_from_the_first_step_on() -> None:
    pool = PumaPool(mask_id=11, shard=RowShard.whole(12), num_stages=8, run=4, block_size=8)
    stream = RandomStream(length=32, vocab_size=11)
    for step in range(8):
        batch = pool.next_batch(stream)
        assert pool.rows is not None
        assert (pool.rows.stage == pool.rows.visit.unsqueeze(1)).all()
        pool.observe(batch, random_stats(batch, step))
