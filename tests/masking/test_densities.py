"""Densities of times against the formulas they stand for, and the weights that undo them, by brute force."""

import math
from collections.abc import Callable
from itertools import combinations

import pytest
import torch

from tests.helpers import RandomStream, chi_square, random_stats, tabular, toy
from unmask.config import recipes
from unmask.errors import UserError
from unmask.masking import time
from unmask.masking.process import RowShard, masked_batch
from unmask.masking.puma import PumaPool
from unmask.masking.time import UNIFORM, Density, stratified
from unmask.masking.uniform import RandomMasking, draw_exactly, draw_independently
from unmask.masking.weights import WEIGHTS, importance

MASK = 6


def normal_cdf(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def truncated(t: float, mean: float, std: float) -> float:
    low, high, at = (normal_cdf((edge - mean) / std) for edge in (0.0, 1.0, t))
    return (at - low) / (high - low)


def beta_cdf(t: float, a: int, b: int) -> float:
    """Of whole parameters: at least a of a + b - 1 uniform numbers lie below t."""
    n = a + b - 1
    return sum(math.comb(n, k) * t**k * (1 - t) ** (n - k) for k in range(a, n + 1))


def table_cdf(t: float, values: list[float]) -> float:
    cells = len(values)
    return sum(value * min(max(t - cell / cells, 0), 1 / cells) for cell, value in enumerate(values))


CASES: dict[str, tuple[dict, Callable[[float], float]]] = {
    "uniform": ({}, lambda t: t),
    "clipped": ({"low": 0.3, "high": 0.8}, lambda t: min(1.0, max(0.0, (t - 0.3) / 0.5))),
    "beta": ({"a": 2, "b": 5}, lambda t: beta_cdf(t, 2, 5)),
    "truncated_normal": ({"mean": 0.4, "std": 0.25}, lambda t: truncated(t, 0.4, 0.25)),
    "logit_normal": ({"mean": -0.5, "std": 0.8}, lambda t: normal_cdf((math.log(t / (1 - t)) + 0.5) / 0.8)),
    "table": ({"values": [0.5, 2.0, 0.5]}, lambda t: table_cdf(t, [0.5, 2.0, 0.5])),
    "mixture": (
        {"of": {"name": "beta", "a": 3, "b": 3}, "uniform": 0.25},
        lambda t: 0.25 * t + 0.75 * beta_cdf(t, 3, 3),
    ),
}


def density(name: str) -> Density:
    return time.read({"name": name, **CASES[name][0]}, "process.time").density()


@pytest.mark.parametrize("name", CASES)
def test_mass_is_that_of_the_formula(name: str) -> None:
    q, cdf = density(name), CASES[name][1]
    t = torch.arange(1, 100, dtype=torch.float64) / 100
    assert q.cdf(torch.tensor(1.0)).item() == pytest.approx(1)
    assert torch.allclose(q.cdf(t), torch.tensor([cdf(float(x)) for x in t], dtype=torch.float64), atol=5e-4)


@pytest.mark.parametrize("name", CASES)
def test_density_is_the_slope_of_the_mass_and_icdf_its_inverse(name: str) -> None:
    q = density(name)
    cells = torch.arange(1, q.cells + 1, dtype=torch.float64) / q.cells
    step = 0.5 / q.cells
    assert torch.allclose(q.density(cells - step), (q.cdf(cells) - q.cdf(cells - step)) / step, atol=1e-8)
    u = torch.rand(1000, dtype=torch.float64).clamp(min=1e-9)
    assert torch.allclose(q.cdf(q.icdf(u)), u, atol=1e-12)
    assert torch.allclose(q.mirrored.cdf(cells), 1 - q.cdf(1 - cells), atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_draws_of_the_global_batch_have_this_density(name: str) -> None:
    """Eight steps suffice: strata keep the mean of a step's 80 draws within some 1/1000, and counts within a few."""
    q = density(name)
    t = torch.stack([stratified(q, torch.arange(40), 40, 0, step, 2) for step in range(8)])
    assert (t > 0).all()
    assert (t <= 1).all()
    bins = 16
    observed = torch.bincount((t * bins).ceil().long().flatten() - 1, minlength=bins).double()
    edges = torch.arange(bins + 1, dtype=torch.float64) / bins
    expected = t.numel() * (q.cdf(edges[1:]) - q.cdf(edges[:-1]))
    has_mass = expected > 0
    assert (observed[~has_mass] == 0).all()
    assert chi_square(observed[has_mass], expected[has_mass]) < 5  # strata are more even than independent draws
    assert t.mean().item() == pytest.approx(q.mean, abs=0.003)


def test_uniform_times_are_the_draws_themselves() -> None:
    u = torch.rand(50, dtype=torch.float64)
    assert torch.equal(UNIFORM.icdf(u), u)
    assert torch.equal(UNIFORM.cdf(u), u)


def nelbo_of(nll: dict[tuple[int, ...], float], length: int) -> float:
    """Proposition 2.1 of 2502.06768, per maskable token, of the summed NLL of each mask."""
    return sum(
        total / (length * math.comb(length - 1, len(mask) - 1)) for mask, total in nll.items()
    ) / length  # fmt: skip


@pytest.fixture(scope="module")
def guesses() -> tuple[dict[tuple[int, ...], float], int]:
    """Of one example of a toy distribution: the summed NLL of every set of masked positions, by a random model."""
    task = toy(values=3, length=6, prompt_length=1)  # 5 to be masked: shares that fp32 does not hold exactly
    model = tabular(task)
    torch.nn.init.normal_(model.backbone.table, generator=torch.Generator().manual_seed(0))
    x0 = task.validation(1).x0
    masks = [tuple(chosen) for n in range(1, 6) for chosen in combinations(range(1, 6), n)]
    xt = torch.stack([x0[0].index_fill(0, torch.tensor(mask), model.mask_id) for mask in masks])
    with torch.no_grad():
        batch = masked_batch(x0.expand(len(masks), -1), xt, model.mask_id, torch.ones(len(masks), dtype=torch.float64))
        total = batch.scatter(model(batch).nll.double() * batch.weight, 0.0).sum(dim=1)
    return dict(zip(masks, total.tolist(), strict=True)), 5


ELIGIBLE = torch.tensor([[[False, True, True, True, True, True]]])
SKEWED_CONFIG = time.Mixture(of=time.Beta(a=2, b=5), uniform=0.3)
SKEWED = SKEWED_CONFIG.density()


@pytest.mark.parametrize(
    ("q", "weight", "is_bound"),
    [
        (UNIFORM, "per_masked", True),
        (UNIFORM, "elbo", True),
        (SKEWED, "importance", True),
        (SKEWED, "per_masked", False),
        (UNIFORM, "flat", False),
    ],
)
def test_the_expected_loss_of_exact_counts(
    q: Density, weight: str, is_bound: bool, guesses: tuple[dict[tuple[int, ...], float], int]
) -> None:
    """Over every count n with its mass, and every set of n positions. Exact: no draws."""
    nll, length = guesses
    expected = 0.0
    for n in range(1, length + 1):
        t = q.icdf(q.cdf(torch.tensor([[(n - 0.5) / length]], dtype=torch.float64)))
        drawn = draw_exactly(q, t, ELIGIBLE, torch.tensor([0]), 0)
        assert drawn.is_masked.sum() == n
        low, high = torch.tensor([n - 1, n], dtype=torch.float64) / length
        probability = float(q.cdf(high) - q.cdf(low))
        mean = sum(total for mask, total in nll.items() if len(mask) == n) / math.comb(length, n)
        expected += probability * mean * WEIGHTS[weight](drawn).item()
    assert (expected == pytest.approx(nelbo_of(nll, length), rel=1e-9)) == is_bound


@pytest.mark.parametrize(("q", "weight"), [(UNIFORM, "elbo"), (SKEWED, "importance")])
def test_the_expected_loss_of_independent_masks(
    q: Density, weight: str, guesses: tuple[dict[tuple[int, ...], float], int]
) -> None:
    """Over t, by quadrature, and every set of positions with its probability t^n (1 - t)^(L - n)."""
    nll, length = guesses
    t = (torch.arange(4096, dtype=torch.float64).unsqueeze(1) + 0.5) / 4096
    drawn = draw_independently(q, t, ELIGIBLE.expand(4096, -1, -1), torch.arange(4096), 0)
    size = torch.tensor([len(mask) for mask in nll])
    probability = t**size * (1 - t) ** (length - size)
    per_time = (probability * torch.tensor(list(nll.values()), dtype=torch.float64)).sum(dim=1, keepdim=True)
    loss = (per_time * WEIGHTS[weight](drawn) * q.density(t)).mean().item()
    assert loss == pytest.approx(nelbo_of(nll, length), rel=1e-5)


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("masking", ["exact", "independent"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_row_weighs_one_on_average(weight: str, masking: str, block_size: int | None) -> None:
    stream = RandomStream(length=16, vocab_size=7)
    process = RandomMasking(
        mask_id=MASK,
        shard=RowShard.whole(64),
        time=SKEWED_CONFIG,
        weight=weight,
        masking=masking,
        block_size=block_size,
    )
    total = 0.0
    for _ in range(40):
        batch = process.next_batch(stream)
        total += batch.weight.sum().item() / 64 / 40
        process.observe(batch, random_stats(batch, 0))
    if (weight, masking) == ("per_masked", "independent"):
        assert total < 1  # the mean of 1/n leaves out the rows where nothing is masked
    elif (weight, masking) == ("flat", "exact"):  # ceil(t L) is half a position more than t L, on average
        lengths = torch.arange(9, 17)
        blocks = (lengths / (block_size or 16)).ceil()
        assert total == pytest.approx((1 + 0.5 * blocks / (lengths * SKEWED.mean)).mean().item(), abs=0.03)
    else:
        assert total == pytest.approx(1, abs=0.06)


def test_a_cap_bounds_what_rare_times_weigh() -> None:
    t = torch.tensor([[0.03], [0.3], [0.98]], dtype=torch.float64)
    drawn = draw_exactly(SKEWED, t, torch.ones(3, 1, 200, dtype=torch.bool), torch.arange(3), 0)
    free, capped = importance(drawn) * drawn.t * 200, importance(drawn, 1.5) * drawn.t * 200
    assert torch.allclose(free, 1 / SKEWED.density(drawn.t), rtol=0.05)
    assert torch.equal(capped, free.clamp(max=1.5))
    assert (free > 1.5).any()


@pytest.mark.parametrize("block_size", [None, 32])
def test_the_stages_of_a_pool_have_equal_mass(block_size: int | None) -> None:
    """Each visited mask of stage s has, from its masked share upwards, about the mass s / K to (s + 1) / K."""
    stream = RandomStream(length=64, vocab_size=7)
    bell, num_stages = time.TruncatedNormal(mean=0.4, std=0.15), 4
    q = bell.density()
    pool = PumaPool(
        mask_id=MASK,
        shard=RowShard.whole(32),
        time=bell,
        num_stages=num_stages,
        order="random",
        block_size=block_size,
    )
    stages = torch.zeros(num_stages)
    for _ in range(12):
        batch = pool.next_batch(stream)
        rows = pool.rows
        t = rows.masked.sum(dim=-1) / rows.num_maskable.clamp(min=1)
        rounding = 1.001 / rows.num_maskable.clamp(min=1)
        surely_above = 1 - q.cdf((t - rounding).clamp(min=0))
        surely_below = 1 - q.cdf((t + rounding).clamp(max=1))
        is_open = (t > 0) & (rows.num_maskable > 6 * num_stages)
        assert (surely_above >= rows.stage / num_stages - 1e-9)[is_open].all()
        assert (surely_below <= (rows.stage + 1) / num_stages + 1e-9)[is_open].all()
        stages += torch.bincount(rows.stage[is_open], minlength=num_stages + 1)[:num_stages]
        pool.observe(batch, random_stats(batch, 0))
    assert stages.min() > 0.7 * stages.max()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("process.time.name=clipped process.time.low=0.5 process.time.high=0.2", "leave no time between them"),
        ("process.time.name=clipped process.time.low=-0.1", "process.time.low=-0.1"),
        ("process.time.name=clipped process.time.high=1.5", "process.time.high=1.5"),
        ("process.time={name: table, values: [1, 2]}", "integrate to 1.5"),
        ("process.time={name: table, values: [0, 0]}", "no time has mass"),
        ("process.time={name: table, values: [-1, 3]}", "never negative"),
        ("process.time.name=truncated_normal process.time.mean=1.5", "process.time.mean=1.5"),
        ("process.time.name=beta process.time.a=0", "process.time.a=0"),
        ("process.time=3", "give the name of a density"),
        ("process.weight=importance process.weight_cap=0.5", "process.weight_cap=0.5"),
        ("process.weight_cap=2", "is for process.weight=importance"),
        ("process.weight=ones", "unknown weight"),
        ("process.masking=some", "unknown masking"),
    ],
)
def test_wrong_settings_are_named(settings: str, said: str) -> None:
    overrides = settings.split(" process") if "{" not in settings else [settings]
    overrides = [part if part.startswith("process") else f"process{part}" for part in overrides]
    with pytest.raises(UserError) as error:
        recipes.load("sudoku/uniform", overrides)
    assert any(part in str(error.value) for part in said.split("|"))


@pytest.mark.parametrize("key", ["process.time", "process.start"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("{name: bta}", "KEY.name=bta: no such density; did you mean 'beta'?"),
        ("bta", "KEY=bta: no such density; did you mean 'beta'?"),
        ("{name: 'nowhere.at:All'}", "KEY.name=nowhere.at:All: cannot import it"),
        (
            "{name: beta, mean: 0.3}",
            "KEY.mean=0.3: is a setting of KEY.name=truncated_normal or logit_normal, and this is beta; remove it, or",
        ),
        ("{name: mixture, of: bell}", "KEY.of=bell: no such density; "),
        ("{name: mixture, uniform: 2, of: beta}", "KEY.uniform=2: "),
        ("{name: mixture, of: {name: beta, a: 0}}", "KEY.of.a=0: "),
        ("{name: mixture, of: {name: beta, c: 1}}", "unknown key KEY.of.c; "),
        ("{name: mixture, of: {name: clipped, low: 0.5, high: 0.2}}", "KEY.of: low=0.5, high=0.2 leave no time"),
        ("{name: mixture, of: 3}", "KEY.of=3: give the name of a density"),
        ("{name: mixture, of: {name: mixture, of: {name: beta, a: 0}}}", "KEY.of.of.a=0: "),
    ],
)
def test_wrong_densities_are_named_as_they_were_written(key: str, wrong: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        recipes.load("sudoku/puma", [f"{key}={wrong}"])
    assert str(error.value).startswith(said.replace("KEY", key))
    assert ({"process.time", "process.start"} - {key}).pop() not in str(error.value)


def test_times_outside_their_range_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Density, "icdf", lambda self, u: 1.2 * u)
    with pytest.raises(UserError, match=r"times lie in \(0, 1\], but some are in \[[0-9.]+, 1.\d+\]"):
        stratified(UNIFORM, torch.arange(40), 40, seed=0, step=0)
