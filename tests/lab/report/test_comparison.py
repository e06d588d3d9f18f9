"""What a comparison says, against values worked out by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest

from unmask.lab.compare import Comparison, SpeedUp, speed_up
from unmask.lab.report.curves import Cost, Curve


def curve(values: list[float], steps: list[int], factor: float = 1.0) -> Curve:
    spent = {"step": 1.0, "seconds": 2 * factor, "examples_seen": 10.0}
    return Curve(tuple(values), {axis: tuple(each * s for s in steps) for axis, each in spent.items()})


def costs(*spent: float | None) -> list[Cost | None]:
    return [None if each is None else Cost(float(each)) for each in spent]


def test_a_cost_lies_between_the_evaluations_around_the_level() -> None:
    rising = curve([0.0, 0.2, 0.6, 0.5], [10, 20, 30, 40])
    assert rising.cost(0.4, "step") == Cost(25.0)
    assert rising.cost(0.4, "seconds") == Cost(50.0)
    assert rising.cost(0.6, "step") == Cost(30.0)
    assert rising.cost(0.7, "step") is None


def test_what_the_first_evaluation_had_reached_cost_that_at_most() -> None:
    early, late = curve([0.6, 0.7], [10, 20]), curve([0.2, 0.7], [10, 20])
    assert early.cost(0.5, "step") == Cost(10.0, is_most=True)
    half = Comparison({"late": [late], "early": [early]}).levels()[0]
    assert (half.cost_text("early", "step"), half.speed_up_text("early", "step")) == ("≤ 10", "≥ 1.60")
    half = Comparison({"early": [early] * 3, "late": [late] * 3}).levels()[0]
    assert half.speed_up_text("late", "step") == "≤ 0.62"  # and no interval
    half = Comparison({"early": [early], "also": [early]}).levels()[0]
    assert half.speed_up_text("also", "step") == "-"


def test_values_between_evaluations_lie_on_straight_lines() -> None:
    assert curve([0.0, 0.4], [10, 20]).at([10.0, 15.0, 20.0], "seconds") == [(20, 0.0), (30, 0.2), (40, 0.4)]


def test_of_a_likelihood_less_is_better() -> None:
    rows = [
        {"step": step, "seconds": 1.0 * step, "examples_seen": step, "eval/nelbo": nelbo}
        for step, nelbo in ((10, 3.0), (20, 2.0), (30, 1.0))
    ]
    baseline, other = Curve.of(rows, "eval/nelbo"), Curve.of(rows[:2], "eval/nelbo")
    assert baseline.cost(2.5, "step") == Cost(15.0)
    assert baseline.cost(0.5, "step") is None
    (level,) = Comparison({"slow": [other], "fast": [baseline]}).levels()
    assert (level.name, level.costs["fast"]["step"]) == ("slow's final 2.0000", [Cost(20.0)])


def test_the_ratio_is_of_the_means() -> None:
    result = speed_up(costs(20.0, 30.0, 40.0), costs(10.0, 10.0, 10.0))
    assert result is not None
    assert result.ratio == 3.0
    # Only the baseline varies: two degrees of freedom, and a standard error of 10 / sqrt(3) of 30.
    assert np.log(result.interval[1] / 3) == pytest.approx(4.303 * 10 / 3**0.5 / 30)
    assert np.log(result.interval[0] / 3) == pytest.approx(-4.303 * 10 / 3**0.5 / 30)
    assert speed_up(costs(20.0, 40.0), costs(10.0, 10.0)).interval is None
    assert speed_up(costs(20.0, 20.0, 20.0), costs(10.0, 10.0, 10.0)) == SpeedUp(2.0)  # no spread to judge by
    assert speed_up(costs(20.0, None, 40.0), costs(10.0, 10.0, 10.0)) is None


@pytest.mark.parametrize("seeds", [3, 4, 10])
@pytest.mark.parametrize("spread", [0.02, 0.08, 0.16], ids=str)
def test_the_interval_covers_the_truth(seeds: int, spread: float) -> None:
    """Costs 100 and 50 on average: the true ratio, 2, lies inside in 95 % of 1,000 trials or a little more."""
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(1000):
        one, other = rng.normal(100, 15, seeds), rng.normal(50, 50 * spread, seeds)
        low, high = speed_up(costs(*one), costs(*other)).interval
        inside += low < 2 < high
    assert 0.93 < inside / 1000 < 0.99


@pytest.mark.parametrize("is_share", [True, False])
def test_every_seed_of_the_baseline_gets_to_the_final_level(is_share: bool) -> None:
    """Seeds that never turn back, each to another value: the last level is reached by all, and has a speed-up."""
    sign = 1 if is_share else -1
    slow = [replace(curve([1.0, 1 + sign * end], [10, 100]), is_share=is_share) for end in (0.3, 0.5, 0.4)]
    fast = [replace(curve([1.0, 1 + sign * end], [10, 60]), is_share=is_share) for end in (0.6, 0.7, 0.8)]
    final = Comparison({"slow": slow, "fast": fast}).levels(at=())[0]
    assert final.level == pytest.approx(1 + sign * 0.3)
    assert final.name.startswith("slow's final, worst seed ")
    assert None not in final.costs["slow"]["step"]
    assert final.speed_ups["fast"]["step"].ratio > 1
    assert final.speed_ups["fast"]["step"].interval is not None


def test_levels_are_held_against_the_baseline() -> None:
    slow = [curve([0.0, 0.5], [0, 100 + seed]) for seed in range(3)]
    fast = [curve([0.0, 1.0], [0, 100], factor=1.5) for _ in range(3)]
    comparison = Comparison({"slow": slow, "fast": fast})
    half, ninety, final = comparison.levels()
    assert half.costs["slow"]["step"] == costs(100, 101, 102)
    assert half.costs["fast"]["step"] == costs(50, 50, 50)
    assert half.speed_ups["fast"]["step"].ratio == pytest.approx(101 / 50)
    assert half.speed_ups["fast"]["seconds"].ratio == pytest.approx(101 / 75)
    assert ninety.costs["slow"]["step"] == [None] * 3
    assert ninety.speed_ups["fast"]["step"] is None
    assert final.name == "slow's final, worst seed 50.0%"
    assert final.level == 0.5
    json.dumps(comparison.as_dict())


def test_a_baseline_that_solves_nothing_is_no_level() -> None:
    nothing = [curve([0.0, 0.0], [10, 20])]
    assert [level.level for level in Comparison({"one": nothing, "other": nothing}).levels()] == [0.5, 0.9]


def test_costs_and_ratios_in_words() -> None:
    slow = [curve([0.0, 0.5], [0, 100]), curve([0.0, 0.5], [0, 300]), curve([0.0, 0.4], [0, 100])]
    fast = [curve([0.0, 1.0], [0, 100 + seed]) for seed in range(3)]
    half, _, final = Comparison({"slow": slow, "fast": fast}).levels()
    assert half.cost_text("slow", "step") == "200 (100 to 300), 2 of 3"
    assert half.cost_text("fast", "examples_seen") == "505 (500 to 510)"
    assert half.speed_up_text("fast", "step") == "-"  # one seed never got there
    assert final.cost_text("slow", "seconds") == "280 (160 to 480)"
    assert Comparison({"one": slow[:1], "other": fast[:1]}).levels()[0].speed_up_text("other", "step") == "2.00"
