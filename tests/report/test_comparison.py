"""What a comparison says, against values worked out by hand."""

import json

import numpy as np
import pytest

from unmask.report.comparison import Comparison, speed_up
from unmask.report.curves import Curve


def curve(values: list[float], steps: list[int], factor: float = 1.0) -> Curve:
    spent = {"step": 1.0, "seconds": 2 * factor, "examples_seen": 10.0}
    return Curve(tuple(values), {axis: tuple(each * s for s in steps) for axis, each in spent.items()})


def test_a_cost_lies_between_the_evaluations_around_the_level() -> None:
    rising = curve([0.0, 0.2, 0.6, 0.5], [10, 20, 30, 40])
    assert rising.cost(0.4, "step") == 25
    assert rising.cost(0.4, "seconds") == 50
    assert rising.cost(0.6, "step") == 30
    assert rising.cost(0.0, "step") == 10
    assert rising.cost(0.7, "step") is None


def test_of_a_likelihood_less_is_better() -> None:
    rows = [
        {"step": step, "seconds": 1.0 * step, "examples_seen": step, "eval/nelbo": nelbo}
        for step, nelbo in ((10, 3.0), (20, 2.0), (30, 1.0))
    ]
    baseline, other = Curve.of(rows, "eval/nelbo"), Curve.of(rows[:2], "eval/nelbo")
    assert baseline.cost(2.5, "step") == 15
    assert baseline.cost(0.5, "step") is None
    (level,) = Comparison({"slow": [other], "fast": [baseline]}).levels()
    assert (level.name, level.costs["fast"]["step"]) == ("slow's final 2.0000", [20])


def test_the_ratio_is_of_the_means() -> None:
    result = speed_up([20.0, 30.0, 40.0], [10.0, 10.0, 10.0])
    assert result is not None
    assert result.ratio == 3.0
    low, high = result.interval
    assert 2.0 <= low < 3.0 < high <= 4.0  # no resample of the seeds can leave this
    assert speed_up([20.0, 40.0], [10.0, 10.0]).interval is None
    assert speed_up([20.0, None, 40.0], [10.0, 10.0, 10.0]) is None


def test_the_interval_covers_the_truth_most_of_the_time() -> None:
    """Ten seeds each, costs 100 and 50 on average: the true ratio, 2, lies inside in nearly 95 % of trials."""
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        one, other = rng.normal(100, 15, 10), rng.normal(50, 8, 10)
        low, high = speed_up(one.tolist(), other.tolist()).interval
        inside += low < 2 < high
    assert 0.82 < inside / 200 < 0.99  # a bootstrap of ten is a little narrow


def test_levels_are_held_against_the_baseline() -> None:
    slow = [curve([0.0, 0.5], [0, 100 + seed]) for seed in range(3)]
    fast = [curve([0.0, 1.0], [0, 100], factor=1.5) for _ in range(3)]
    comparison = Comparison({"slow": slow, "fast": fast})
    half, ninety, final = comparison.levels()
    assert half.costs["slow"]["step"] == [100, 101, 102]
    assert half.costs["fast"]["step"] == [50, 50, 50]
    assert half.speed_ups["fast"]["step"].ratio == pytest.approx(101 / 50)
    assert half.speed_ups["fast"]["seconds"].ratio == pytest.approx(101 / 75)
    assert ninety.costs["slow"]["step"] == [None] * 3
    assert ninety.speed_ups["fast"]["step"] is None
    assert final.name == "slow's final 50.0%"
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
    assert final.cost_text("slow", "seconds").endswith("2 of 3")
    assert Comparison({"one": slow[:1], "other": fast[:1]}).levels()[0].speed_up_text("other", "step") == "2.00"
