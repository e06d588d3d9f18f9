"""What a process makes ahead of its step: it changes nothing, loses nothing, and no step waits for it.

The settings are those of `test_contract.py`.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.helpers import RandomStream, assert_same, random_stats
from tests.masking.test_contract import CASES, LENGTH, MASK, ROWS, STEPS, assert_equal, build, cases, statistics
from unmask.data.stream import Prefetcher
from unmask.masking.pool import Pool
from unmask.masking.process import RowShard
from unmask.masking.puma import PumaPool
from unmask.masking.time import stratified
from unmask.types import AsyncCopy, CleanBatch, MaskedBatch, TokenStats

# Uniform masks and autoregression make their batches on the CPU, and keep no rows.
pools = pytest.mark.parametrize("settings", [case for case in CASES if case["name"].startswith("puma")], ids=str)


def build_pool(settings: dict) -> Pool:
    process = build(settings)
    assert isinstance(process, Pool)
    return process


@cases
def test_nothing_depends_on_what_is_made_ahead(settings: dict) -> None:
    """A process that is reloaded before every step, or given another stream of the same examples, goes on alike."""
    process, reloaded, switched = (build(settings) for _ in range(3))
    streams = [RandomStream(length=LENGTH, vocab_size=7) for _ in range(2)]
    for step in range(STEPS):
        reloaded.load_state_dict(reloaded.state_dict())
        batch = process.next_batch(streams[0])
        for other, stream in ((reloaded, streams[0]), (switched, streams[step // 3 % 2])):
            assert_equal(batch, other.next_batch(stream))
        for each in (process, reloaded, switched):
            each.observe(batch, statistics(process, batch, step))
        assert process.examples_seen == reloaded.examples_seen == switched.examples_seen
        assert_same(process.state_dict(), reloaded.state_dict())
        assert_same(process.state_dict(), switched.state_dict())


@pools
def test_a_pool_takes_from_the_stream_it_is_given(settings: dict) -> None:
    """Also where it has made rows of another one ahead."""
    process = build_pool(settings)
    streams = [RandomStream(length=LENGTH, vocab_size=size) for size in (4, 5)]
    for step in range(STEPS):
        batch = process.next_batch(streams[step % 2])
        assert process.rows is not None
        is_new = process.rows.visit == 0
        assert torch.equal(batch.x0[is_new], streams[step % 2][process.rows.example[is_new]].x0)
        process.observe(batch, statistics(process, batch, step))


@pools
def test_a_pool_that_lost_its_rows_begins_as_a_new_one(settings: dict, stream: RandomStream) -> None:
    used, new = build_pool(settings), build_pool(settings)
    for step in range(5):
        batch = used.next_batch(stream)
        used.observe(batch, statistics(used, batch, step))
    state = used.drop_rows(used.state_dict())
    for process in (used, new):
        process.load_state_dict(state)
    assert_equal(used.next_batch(stream), new.next_batch(stream))


@cases
def test_a_stream_that_fails_costs_nothing_but_time(settings: dict) -> None:
    """What it says is said when its examples are asked for, and a repeated step goes on as if nothing had been."""

    class Failing(RandomStream):
        is_broken = False

        def __getitem__(self, number: torch.Tensor) -> CleanBatch:
            if self.is_broken:
                raise OSError("disk")
            return super().__getitem__(number)

    process, failed = build(settings), build(settings)
    stream, failing = RandomStream(length=LENGTH, vocab_size=7), Failing(length=LENGTH, vocab_size=7)
    num_failures = 0
    for step in range(STEPS):
        batch = process.next_batch(stream)
        failing.is_broken = step % 3 > 0
        try:
            repeated = failed.next_batch(failing)
        except OSError:
            num_failures += 1
            failing.is_broken = False
            repeated = failed.next_batch(failing)
        assert_equal(batch, repeated)
        assert process.examples_seen == failed.examples_seen
        failing.is_broken = step % 3 == 1
        for each in (process, failed):
            each.observe(batch, statistics(process, batch, step))
    assert_same(process.state_dict(), failed.state_dict())
    assert num_failures


def test_rows_that_a_pool_of_ones_own_changes_late_are_those_of_the_next_step(stream: RandomStream) -> None:
    class Hiding(PumaPool):
        """Masks the last position again."""

        def observe(self, batch: MaskedBatch, stats: TokenStats) -> None:
            super().observe(batch, stats)
            assert self.rows is not None
            self.rows.is_masked = self.rows.is_masked.index_fill(1, torch.tensor([LENGTH - 1]), True)

    process, reloaded = (Hiding(mask_id=MASK, shard=RowShard.whole(ROWS), num_stages=4) for _ in range(2))
    for step in range(STEPS):
        reloaded.load_state_dict(reloaded.state_dict())
        batch = process.next_batch(stream)
        assert_equal(batch, reloaded.next_batch(stream))
        for each in (process, reloaded):
            each.observe(batch, random_stats(batch, step))


class NoWaits(TorchFunctionMode):
    """Refuses what has to wait for a device: values that leave it, and shapes that depend on them."""

    VALUES = frozenset({"cpu", "tolist", "numpy", "item", "equal", "allclose", "__bool__", "__int__", "__float__"})
    SHAPES = frozenset({"nonzero", "masked_select", "unique", "unique_consecutive", "bincount", "repeat_interleave"})

    def __init__(self) -> None:
        super().__init__()
        self.is_lifted = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__
        if not self.is_lifted:
            index = args[1] if name in ("__getitem__", "__setitem__") else ()
            has_mask = any(isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in always_tuple(index))
            if has_mask or name in self.VALUES | self.SHAPES:
                raise AssertionError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))

    def lifting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `function` as it runs where waiting is allowed."""

        def run(*args: Any, **kwargs: Any) -> Any:
            before, self.is_lifted = self.is_lifted, True
            try:
                return function(*args, **kwargs)
            finally:
                self.is_lifted = before

        return run


def always_tuple(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


@pools
def test_a_pool_waits_for_nothing_but_what_set_out_before(
    settings: dict, stream: RandomStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What sets out for the CPU in `observe`, `AsyncCopy`, may be read in the next step, and nothing else may."""
    process, guard = build_pool(settings), NoWaits()
    arrived = AsyncCopy.wait

    def read(copy: AsyncCopy) -> SimpleNamespace:
        value = arrived(copy)
        return SimpleNamespace(tolist=guard.lifting(value.tolist), nonzero=guard.lifting(value.nonzero))

    monkeypatch.setattr(AsyncCopy, "wait", read)
    monkeypatch.setattr(Prefetcher, "restock", guard.lifting(Prefetcher.restock))  # on the CPU, but for what it sends
    monkeypatch.setattr("unmask.masking.puma.stratified", guard.lifting(stratified))  # on the CPU
    for step in range(STEPS):
        guard.is_lifted = step < 2  # at first, nothing has set out
        with guard:
            batch = process.next_batch(stream)
        stats = statistics(process, batch, step)
        with guard:
            process.observe(batch, stats)
        assert process._ahead is not None  # `observe` leaves what fails there to the next step
