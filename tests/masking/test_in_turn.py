"""One process, then another: each does what it would alone, and no example is met by both."""

import pytest
import torch

from tests.helpers import RandomStream, random_stats
from unmask import recipes
from unmask.errors import UserError
from unmask.masking.causal import NextToken
from unmask.masking.in_turn import InTurn, ShiftedStream
from unmask.masking.process import ProcessContext, Requirements, RowShard
from unmask.masking.puma import PumaPool
from unmask.masking.random import RandomMasking
from unmask.types import TokenSpec

MASK, BATCH, SWITCH = 6, 8, 3


def parts() -> tuple[RandomMasking, PumaPool]:
    shard = RowShard.whole(BATCH)
    first = RandomMasking(mask_id=MASK, shard=shard, seed=1)
    return first, PumaPool(mask_id=MASK, shard=shard, seed=1, num_stages=3, threshold=0.7)


def test_each_does_what_it_would_alone(stream: RandomStream) -> None:
    both = InTurn(*parts(), SWITCH, BATCH)
    first, then = parts()
    for step in range(10):
        alone, start = (first, 0) if step < SWITCH else (then, SWITCH * BATCH)
        batch = both.next_batch(stream)
        expected = alone.next_batch(ShiftedStream(stream, start))
        assert torch.equal(batch.xt, expected.xt)
        stats = random_stats(batch, step)
        both.observe(batch, stats)
        alone.observe(expected, stats)
    assert both.examples_seen == first.examples_seen + then.examples_seen
    assert both.metrics() == then.metrics()


def test_no_example_is_met_twice() -> None:
    stream = RandomStream(length=12, vocab_size=7)
    process = InTurn(*parts(), SWITCH, BATCH)
    for step in range(12):
        batch = process.next_batch(stream)
        process.observe(batch, random_stats(batch, step))
    assert len(stream.fetched) == len(set(stream.fetched))
    assert (
        process.examples_seen <= len(stream.fetched) <= process.examples_seen + BATCH
    )  # a pool has the next ones ready


@pytest.mark.parametrize("stop", [1, SWITCH, 6])
def test_it_resumes(stop: int, stream: RandomStream) -> None:
    whole, start = InTurn(*parts(), SWITCH, BATCH), InTurn(*parts(), SWITCH, BATCH)
    for step in range(9):
        if step == stop:
            again = InTurn(*parts(), SWITCH, BATCH)
            again.load_state_dict(start.state_dict())
            start = again
        batches = [process.next_batch(stream) for process in (whole, start)]
        assert torch.equal(batches[0].xt, batches[1].xt)
        for process, batch in zip((whole, start), batches, strict=True):
            process.observe(batch, random_stats(batch, step))


def test_both_must_ask_for_one_confidence() -> None:
    shard = RowShard.whole(BATCH)
    random = RandomMasking(mask_id=MASK, shard=shard)
    prob, margin = (PumaPool(mask_id=MASK, shard=shard, confidence=confidence) for confidence in ("prob", "margin"))
    assert InTurn(margin, random, SWITCH, BATCH).requirements.confidence == "margin"
    assert InTurn(random, margin, SWITCH, BATCH).requirements.confidence == "margin"
    with pytest.raises(UserError, match="different confidences"):
        InTurn(prob, margin, SWITCH, BATCH)


def test_both_must_train_one_model() -> None:
    shard = RowShard.whole(BATCH)
    random, blocks = (RandomMasking(mask_id=MASK, shard=shard, block_size=size) for size in (None, 4))
    pool = PumaPool(mask_id=MASK, shard=shard, confidence="margin", block_size=4)
    assert InTurn(blocks, pool, SWITCH, BATCH).requirements == Requirements(confidence="margin", block_size=4)
    with pytest.raises(UserError, match=r"process.first.block_size=None and process.then.block_size=4: .* equal"):
        InTurn(random, pool, SWITCH, BATCH)
    with pytest.raises(UserError, match="trains a causal model, the other does not"):
        InTurn(NextToken(shard=shard), random, SWITCH, BATCH)


def test_the_model_takes_the_block_size_of_both() -> None:
    parts = ["process={name: in_turn, switch_at: 5, first: {block_size: 27}, then: {name: puma, block_size: 27}}"]
    assert recipes.load("debug", parts).model.model_dump()["block_size"] == 27


def test_from_a_recipe() -> None:
    own = ["process.name=in_turn", "process.switch_at=5", "process.first.name=uniform", "process.then.name=puma"]
    config = recipes.load("debug", [*own, "process.then.num_stages=3"]).process
    tokens = TokenSpec(vocab_size=7, length=12, mask_id=MASK)
    process = InTurn.from_config(config, ProcessContext(tokens=tokens, shard=RowShard.whole(4), seed=0))
    assert isinstance(process.first, RandomMasking)
    assert process.then.num_stages == 3
    with pytest.raises(UserError, match=r"unknown key process.then.num_stage; did you mean process.then.num_stages"):
        recipes.load("debug", [*own, "process.then.num_stage=3"])
    with pytest.raises(UserError, match=r"process.first.*process.name=pumma: no such process; did you mean 'puma'"):
        recipes.load("debug", [*own, "process.first.name=pumma"])
    with pytest.raises(UserError, match=r"process.then is missing"):
        recipes.load("debug", own[:3])
