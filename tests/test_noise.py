import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import chi_square
from unmask import noise
from unmask.noise import Purpose


def test_the_hash_is_splitmix64() -> None:
    # First two outputs of the reference implementation for seed 0 (Vigna, splitmix64.c).
    assert noise._mix_int(noise._GOLDEN) == 0xE220A8397B1DCDAF
    assert noise._mix_int(2 * noise._GOLDEN & noise._MASK64) == 0x6E789E6AA1B965F4


def test_tensors_and_ints_hash_alike() -> None:
    keys = torch.tensor([0, 1, 12345, 2**62])
    expected = [noise.integer(7, Purpose.MASK, 3, key) for key in keys.tolist()]
    assert ((noise.bits(7, Purpose.MASK, 3, keys) >> 1) & (2**63 - 1)).tolist() == expected


def test_uniform_passes_chi_square_and_is_uncorrelated_along_every_key() -> None:
    example, visit, position = torch.arange(50)[:, None, None], torch.arange(20)[:, None], torch.arange(100)
    u = noise.uniform(0, Purpose.MASK, example, visit, position)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(chi_square(torch.histc(u, 100, 0, 1), torch.full((100,), u.numel() / 100))) < 5
    for axis in range(3):
        neighbours = torch.stack(
            [u.narrow(axis, 0, u.shape[axis] - 1).flatten(), u.narrow(axis, 1, u.shape[axis] - 1).flatten()]
        )
        assert abs(torch.corrcoef(neighbours)[0, 1]) < 5 / neighbours.shape[1] ** 0.5


def test_purposes_and_seeds_are_independent() -> None:
    number = torch.arange(10_000)
    draws = [noise.uniform(seed, purpose, number) for seed in (0, 1) for purpose in Purpose]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 5.5 / 100  # about 700 pairs of 10,000 numbers


def test_what_else_is_asked_for_does_not_matter() -> None:
    example, position = torch.arange(8), torch.arange(30)
    together = noise.uniform(3, Purpose.ORDER, example[:, None], position)
    alone = torch.stack([noise.uniform(3, Purpose.ORDER, torch.tensor(e), position) for e in range(8)])
    assert torch.equal(together, alone)


def test_gumbel_has_its_mean_and_variance() -> None:
    g = noise.gumbel(0, Purpose.VALUE, torch.arange(100_000))
    assert abs(g.mean() - np.euler_gamma) < 5 * (np.pi**2 / 6 / 1e5) ** 0.5
    assert abs(g.var() - np.pi**2 / 6) < 0.05


def test_may_be_below_misses_none_and_adds_few() -> None:
    key = torch.arange(200_000)
    limit = 10 ** torch.linspace(-6, 0, len(key))
    is_below = (-noise.gumbel(0, Purpose.VALUE, key)).exp() < limit
    found = noise.may_be_below(limit, 0, Purpose.VALUE, key)
    assert (found | ~is_below).all()
    assert 0 < found.sum() - is_below.sum() < 0.5 * is_below.sum()
    assert not noise.may_be_below(torch.zeros(len(key)), 0, Purpose.VALUE, key).any()


@given(size=st.integers(1, 300), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_permute_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    out = noise.permute(torch.arange(size), size, seed, Purpose.SHUFFLE, epoch)
    assert out.sort().values.tolist() == list(range(size))
    walked = noise.permute(torch.arange(size), size, seed, Purpose.SHUFFLE, torch.tensor(epoch))  # without a table
    assert torch.equal(out, walked)


@pytest.mark.parametrize("size", [2, 3, 5, 7, 16, 30])
def test_permutations_put_every_pair_everywhere(size: int) -> None:
    repeats = 20_000
    index = torch.arange(size).expand(repeats, size)
    out = noise.permute(index, size, 0, Purpose.SHUFFLE, torch.arange(repeats)[:, None])
    places = torch.bincount(out[:, 0] * size + out[:, 1], minlength=size**2).double().view(size, size)
    assert places.diagonal().sum() == 0
    counts = places[~torch.eye(size, dtype=torch.bool)]
    assert abs(chi_square(counts, torch.full_like(counts, repeats / len(counts)))) < 5


@pytest.mark.gpu
def test_gpu_draws_the_same_numbers() -> None:
    keys = torch.arange(1000)
    assert torch.equal(noise.uniform(0, Purpose.MASK, keys.cuda()).cpu(), noise.uniform(0, Purpose.MASK, keys))
