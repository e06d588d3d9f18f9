"""The estimate from drawn masks is unbiased, by enumeration, and varies less than a plain mean; its error is stated."""

import math
import statistics
from itertools import combinations, product

import pytest
import torch

from unmask.evaluation.regression import estimate_draws, stratified_stderr

Mask = tuple[int, ...]
DOUBLE = torch.float64


def table(length: int, first: int = 0) -> dict[Mask, torch.Tensor]:
    """An NLL of each masked position for each mask of a block: the position's own, and chance."""
    generator = torch.Generator().manual_seed(first)
    own = torch.rand(length, generator=generator, dtype=DOUBLE) * 5
    found = {}
    for n in range(1, length + 1):
        for places in combinations(range(length), n):
            nll = torch.zeros(length, dtype=DOUBLE)
            nll[[*places]] = own[[*places]] + torch.rand(n, generator=generator, dtype=DOUBLE) + n / length
            found[places] = nll
    return found


def exact(nll: dict[Mask, torch.Tensor]) -> float:
    length = max(map(len, nll))
    return sum(value.sum().item() / len(places) / math.comb(length, len(places)) for places, value in nll.items())


def estimate(tables: list[dict[Mask, torch.Tensor]], masks: list[list[Mask]]) -> float:
    """The estimate from one mask of each block for each draw."""
    sizes = [max(map(len, nll)) for nll in tables]
    values = torch.stack([torch.cat([nll[mask] for nll, mask in zip(tables, draw, strict=True)]) for draw in masks])
    return (
        estimate_draws(values, values > 0, torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)))
        .mean()
        .item()
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_mean_over_all_ways_to_draw_is_exact(size: int) -> None:
    nll = table(size)
    ways = [list(combinations(range(size), n)) for n in range(1, size + 1)]
    found = [estimate([nll], [[mask] for mask in masks]) for masks in product(*ways)]
    assert len(found) == math.prod(map(len, ways))
    assert statistics.mean(found) == pytest.approx(exact(nll), abs=1e-12)


def test_blocks_are_summed() -> None:
    """Two draws of blocks of two and three, whose masks are drawn apart."""
    tables = [table(2), table(3, first=1)]
    counts = [(1, 2), (2, 3)]  # n of each draw, of each block: any, as they are given
    ways = [
        [
            list(way)
            for way in product(*(combinations(range(size), n[draw]) for size, n in zip((2, 3), counts, strict=True)))
        ]
        for draw in range(2)
    ]
    found = [estimate(tables, [*masks]) for masks in product(*ways)]
    plain = 0.0
    for nll, n in zip(tables, counts, strict=True):
        size = max(map(len, nll))
        for each in n:
            plain += (
                statistics.mean(nll[places].sum().item() for places in combinations(range(size), each))
                * size
                / each
                / 2
            )
    assert statistics.mean(found) == pytest.approx(plain, abs=1e-12)


def test_one_draw_is_a_plain_mean() -> None:
    nll = table(4)
    assert estimate([nll], [[(1, 2)]]) == pytest.approx(nll[1, 2].sum().item() * 2, abs=1e-12)
    assert stratified_stderr(torch.ones(1)) is None


@pytest.mark.parametrize("draws", [12, 11])
def test_hard_positions_add_little_noise_and_the_error_is_stated(draws: int) -> None:
    """Each draw masks n = ceil(12 (d + 1) / D) of 12 positions, of which some are always hard."""
    length, generator = 12, torch.Generator().manual_seed(1)
    own = torch.rand(length, generator=generator, dtype=DOUBLE) * 5
    counts = -(-torch.arange(1, draws + 1) * length // draws)
    plain, regressed, errors = [], [], []
    for _ in range(600):
        rank = torch.rand(draws, length, generator=generator).argsort(-1).argsort(-1)
        is_masked = rank < counts[:, None]
        beside = torch.nn.functional.pad(is_masked, (1, 0))[:, :-1]
        nll = (own + beside + torch.rand(draws, length, generator=generator, dtype=DOUBLE)) * is_masked
        found = estimate_draws(nll, is_masked, torch.zeros(length, dtype=torch.long))
        plain.append((nll.sum(dim=1) * length / counts).mean().item())
        regressed.append(found.mean().item())
        errors.append(stratified_stderr(found) or 0.0)
    spread = statistics.stdev(regressed)
    neighbours = statistics.mean(
        (counts - 1).tolist()
    )  # L - 1 positions have one, masked in (n - 1) / (L - 1) of cases
    expected = own.sum().item() + length / 2 + neighbours
    assert statistics.mean(regressed) == pytest.approx(expected, abs=4 * spread / math.sqrt(600))
    assert spread < 0.7 * statistics.stdev(plain)
    assert 0.8 < math.sqrt(statistics.mean(error**2 for error in errors)) / spread < 1.25
