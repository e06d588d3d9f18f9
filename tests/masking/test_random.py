import pytest
import torch

from tests.helpers import RandomStream, chi_square, random_stats
from unmask.errors import UserError
from unmask.masking.process import RowShard
from unmask.masking.time import UNIFORM, masked_count, stratified
from unmask.masking.uniform import RandomMasking

MASK = 6


def process(shard: RowShard, seed: int = 0) -> RandomMasking:
    return RandomMasking(mask_id=MASK, shard=shard, seed=seed)


@pytest.mark.parametrize("block_size", [12, 4])
def test_counts_are_uniform_and_the_prompt_is_never_masked(block_size: int, stream: RandomStream) -> None:
    masking = RandomMasking(mask_id=MASK, shard=RowShard.whole(60), block_size=block_size)
    counts = torch.zeros(12 // block_size, block_size + 1)
    for step in range(150):
        batch = masking.next_batch(stream)
        clean = stream[step * 60 + torch.arange(60)]
        is_masked = batch.xt == MASK
        assert not (is_masked & clean.prompt_mask).any()
        assert torch.equal(batch.xt[~is_masked], clean.x0[~is_masked])
        for n, own in enumerate(is_masked.split(block_size, dim=1)):
            full = ~clean.prompt_mask.split(block_size, dim=1)[n].any(dim=1)  # blocks of the full length
            counts[n] += torch.bincount(own.sum(1)[full], minlength=block_size + 1)
        masking.observe(batch, random_stats(batch, 0))
    assert (counts[:, 0] == 0).all()
    # Stratification makes the counts more even than independent draws would: only the upper side can fail.
    for own in counts[:, 1:]:
        assert chi_square(own, torch.full((block_size,), float(own.sum() / block_size))) < 5


def test_every_set_of_a_size_is_equally_likely() -> None:
    stream = RandomStream(length=2 * 2, vocab_size=7)
    masking = process(RowShard.whole(64))
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(300):
        batch = masking.next_batch(stream)
        for row in (batch.xt == MASK).int().tolist():
            if sum(row) == 2 and row[0]:  # rows without a prompt, two masked
                counts[tuple(row)] = counts.get(tuple(row), 0) + 1
        masking.observe(batch, random_stats(batch, 0))
    observed = torch.tensor(list(counts.values()), dtype=torch.float64)
    assert len(observed) == 3
    assert chi_square(observed, torch.full_like(observed, float(observed.mean()))) < 5


def test_the_weight_is_one_over_the_masked_count(stream: RandomStream) -> None:
    batch = process(RowShard.whole(16)).next_batch(stream)
    is_masked = batch.xt == MASK
    expected = is_masked / is_masked.sum(dim=1, keepdim=True).double()
    assert torch.allclose(batch.scatter(batch.weight, 0.0), expected)
    assert batch.weight[batch.scored == batch.x0.numel()].eq(0).all()


@pytest.mark.parametrize(("rows", "num_blocks"), [(32, 1), (8, 4)])
def test_times_are_stratified_over_the_blocks_of_the_global_batch(rows: int, num_blocks: int) -> None:
    for step in range(5):
        t = stratified(UNIFORM, torch.arange(rows), rows, 0, step, num_blocks)
        assert t.shape == (rows, num_blocks)
        assert (t > 0).all()
        assert (t <= 1).all()
        assert torch.equal((t * 32).ceil().long().flatten().sort().values, torch.arange(1, 33))


def test_masked_count_covers_one_to_l() -> None:
    t, length = torch.tensor([1e-9, 0.25, 0.2500001, 1.0]), torch.tensor([4, 4, 4, 4])
    assert masked_count(t, length).tolist() == [1, 1, 2, 4]


def test_a_cap_is_of_importance_alone() -> None:
    with pytest.raises(UserError, match=r"process.weight_cap=2 is for process.weight=importance, not elbo"):
        RandomMasking(mask_id=3, shard=RowShard.whole(2), weight="elbo", weight_cap=2.0)


def test_a_state_with_the_former_key_time_goes_on(stream: RandomStream) -> None:
    masking, again = process(RowShard.whole(8)), process(RowShard.whole(8))
    masking.observe(batch := masking.next_batch(stream), random_stats(batch, 0))
    again.load_state_dict({**masking.state_dict(), "time": {}})
    assert torch.equal(again.next_batch(stream).xt, masking.next_batch(stream).xt)
