"""The examples that lie ready for a pool, and batches made ahead of their step."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.helpers import RandomStream, assert_same, random_stats
from unmask.data.stream import Prefetcher
from unmask.masking.process import RowShard
from unmask.masking.uniform import RandomMasking
from unmask.types import CleanBatch

CPU = torch.device("cpu")


class CountingStream:
    """The n-th example is n, everywhere."""

    def __getitem__(self, number: torch.Tensor) -> CleanBatch:
        return CleanBatch(x0=number[:, None].expand(-1, 3), prompt_mask=torch.zeros(len(number), 3, dtype=torch.bool))


@pytest.mark.parametrize("seed", range(5))
def test_every_row_finds_its_next_example_ready(seed: int) -> None:
    """Whatever is taken, and however often."""
    rows, stride = 6, 10
    taken = torch.rand(30, rows, generator=torch.Generator().manual_seed(seed)) < torch.linspace(0, 1, rows)
    expected = torch.arange(rows) + stride
    ready = Prefetcher(CountingStream(), expected.clone(), stride=stride, device=CPU)
    for is_taken in taken:
        ready.restock(CountingStream())
        assert torch.equal(ready.clean.x0, expected[:, None].expand(-1, 3))
        ready.take(is_taken)
        expected = expected + stride * is_taken


def test_a_batch_made_ahead_is_the_one_of_its_step() -> None:
    """As on a GPU, where a thread makes the next one; also after a resume, and with another stream."""
    plain, ahead = (RandomMasking(mask_id=6, shard=RowShard.whole(5), seed=1) for _ in range(2))
    ahead._reader = ThreadPoolExecutor(1)
    streams = RandomStream(length=12, vocab_size=7), RandomStream(length=12, vocab_size=7)
    for step in range(8):
        stream = streams[step // 3 % 2]
        if step == 5:
            for process in (plain, ahead):
                process.load_state_dict({**process.state_dict(), "step": 2})
        batch, early = plain.next_batch(stream), ahead.next_batch(stream)
        for name, value in vars(batch).items():
            assert_same(value, getattr(early, name))
        for process in (plain, ahead):
            process.observe(batch, random_stats(batch, step))
    assert ahead._ahead is not None


def test_what_a_stream_says_is_wrong_is_said_when_it_is_asked_for() -> None:
    class Broken(CountingStream):
        def __getitem__(self, number: torch.Tensor) -> CleanBatch:
            if number.max() >= 5:
                raise ValueError("row 5")
            return super().__getitem__(number)

    process, stream = RandomMasking(mask_id=6, shard=RowShard.whole(5)), Broken()
    process._reader = ThreadPoolExecutor(1)
    batch = process.next_batch(stream)
    process.observe(batch, random_stats(batch, 0))
    with pytest.raises(ValueError, match="row 5"):
        process.next_batch(stream)
