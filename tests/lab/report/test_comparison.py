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


def costs(*spent: float) -> list[Cost]:
    return [Cost(float(each)) for each in spent]


def test_a_cost_lies_between_the_evaluations_around_the_level() -> None:
    rising = curve([0.0, 0.2, 0.6, 0.7], [10, 20, 30, 40])
    assert rising.cost(0.4, "step") == Cost(25.0)
    assert rising.cost(0.4, "seconds") == Cost(50.0)
    assert rising.cost(0.6, "step") == Cost(30.0)
    assert rising.cost(0.8, "step") == Cost(40.0, is_least=True)


def test_evaluations_that_turn_back_are_pooled() -> None:
    """0.7, 0.3 and 0.5 are 0.5, from the middle of the first two on; 0.4 beyond them pulls them down to 0.475."""
    rising = curve([0.0, 0.7, 0.3, 0.5], [10, 20, 30, 40])
    assert rising.final == pytest.approx(0.5)
    assert rising.cost(0.25, "step").spent == pytest.approx(17.5)
    assert rising.cost(0.7, "step") == Cost(40.0, is_least=True)  # which one evaluation had by luck
    assert curve([0.0, 0.7, 0.3, 0.5, 0.4], [10, 20, 30, 40, 50]).final == pytest.approx(0.475)
    falling = replace(curve([4.0, 1.0, 3.0, 2.0], [10, 20, 30, 40]), is_share=False)
    assert falling.final == pytest.approx(2.0)
    assert falling.cost(3.0, "step").spent == pytest.approx(17.5)


def test_a_level_costs_as_much_however_long_it_is_kept() -> None:
    for kept in range(1, 6):
        flat = curve([0.0] * kept + [1.0] * kept, [10.0 * (number + 1) for number in range(2 * kept)])
        assert flat.cost(1.0, "step") == Cost(10.0 * (kept + 1))
        assert flat.cost(0.5, "step").spent == pytest.approx(10.0 * kept + 5)


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
    assert baseline.cost(0.5, "step").is_least
    (level,) = Comparison({"slow": [other], "fast": [baseline]}).levels()
    assert (level.name, level.costs["fast"]["step"]) == ("2.0000, where slow and fast came", [Cost(20.0)])


def test_the_ratio_is_of_the_means() -> None:
    result = speed_up(costs(20.0, 30.0, 40.0), costs(10.0, 10.0, 10.0))
    assert result is not None
    assert result.ratio == 3.0
    # Only the baseline varies: two degrees of freedom, and a standard error of 10 / sqrt(3) of 30.
    assert np.log(result.interval[1] / 3) == pytest.approx(4.303 * 10 / 3**0.5 / 30)
    assert np.log(result.interval[0] / 3) == pytest.approx(-4.303 * 10 / 3**0.5 / 30)
    assert speed_up(costs(20.0, 40.0), costs(10.0, 10.0)).interval is None
    assert speed_up(costs(20.0, 20.0, 20.0), costs(10.0, 10.0, 10.0)) == SpeedUp(2.0)  # no spread to judge by
    unfinished = [Cost(30.0, is_least=True), *costs(20.0, 40.0)]
    assert speed_up(unfinished, costs(10.0, 10.0, 10.0)) == SpeedUp(3.0, "≥ ")
    assert speed_up(costs(60.0), unfinished) == SpeedUp(2.0, "≤ ")
    assert speed_up(unfinished, unfinished) is None


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


SHAPES = {
    "rises": lambda progress: 1 - np.exp(-2 * progress),
    "falls": lambda progress: 4 - 2 * np.tanh(progress),  # as a NELBO does
    "leaves a plateau": lambda progress: 1 / (1 + np.exp(8 * (0.6 - progress))),
}
STEPS = [100.0 * (n + 1) for n in range(10)]


def simulated(rng: np.random.Generator, shape: str, seeds: "np.ndarray", noise: float) -> list[Curve]:
    """Curves of a method whose seeds get on at these speeds, evaluated with noise."""
    spent = {axis: tuple(STEPS) for axis in ("step", "seconds", "examples_seen")}
    values = SHAPES[shape](np.outer(seeds, STEPS) / 1000) + rng.normal(0, noise, (len(seeds), len(STEPS)))
    return [Curve(tuple(own), spent, is_share=shape != "falls") for own in values.tolist()]


@pytest.mark.parametrize("times", [1.0, 2.0], ids=["equal", "twice as fast"])
@pytest.mark.parametrize("pairing", ["unpaired", "paired"])
@pytest.mark.parametrize(
    ("shape", "spread", "noise"),
    [("rises", 0.10, 0.02), ("rises", 0.25, 0.0), ("falls", 0.25, 0.02), ("leaves a plateau", 0.10, 0.0)],
)
def test_no_method_is_preferred(shape: str, spread: float, noise: float, pairing: str, times: float) -> None:
    """Three seeds of two methods, 600 trials (200 if one is twice as fast): the median ratio is 1, or 2.

    Paired seeds of the two methods have half of their luck in common. The median of 600 ratios has a standard error of
    1.25 x 0.25 x sqrt(2 / 3) / sqrt(600) = 1 % at a spread of 25 %; the numbers are always the same ones.
    """
    rng = np.random.default_rng(2)
    ratios, inside = [], 0
    trials = 600 if times == 1 else 200
    for _ in range(trials):
        luck = rng.normal(0, spread, (2, 3))
        if pairing == "paired":
            luck = (luck + rng.normal(0, spread, 3)) / 2**0.5
        baseline, method = np.exp(luck)
        methods = {"one": simulated(rng, shape, baseline, noise), "other": simulated(rng, shape, times * method, noise)}
        (level,) = Comparison(methods).levels(at=())
        found = level.speed_ups["other"]["step"]
        assert found is not None  # also where one of them came less far: leaving such trials out would choose by luck
        ratios.append(found.ratio)
        assert found.interval is not None
        inside += found.interval[0] < times < found.interval[1]
    assert np.median(ratios) == pytest.approx(times, rel=0.02 if times == 1 else 0.05)
    assert inside / trials >= 0.93


def test_the_last_level_is_where_all_seeds_of_both_methods_came() -> None:
    slow = [curve([0.0, end], [10, 100]) for end in (0.3, 0.5, 0.4)]
    fast = [curve([0.0, end], [10, 60]) for end in (0.6, 0.7, 0.8)]
    for methods in ({"slow": slow, "fast": fast}, {"fast": fast, "slow": slow}):
        (level,) = Comparison(methods).levels(at=())
        assert level.level == 0.3
        assert level.name == f"30.0%, where every seed of {' and '.join(methods)} came"
        assert level.costs["slow"]["step"][0] == Cost(100.0)
    ahead, behind = (
        Comparison(methods).levels(at=())[0].speed_ups
        for methods in ({"slow": slow, "fast": fast}, {"fast": fast, "slow": slow})
    )
    assert ahead["fast"]["step"].ratio == pytest.approx(1 / behind["slow"]["step"].ratio)


def test_a_method_that_learns_little_does_not_lower_the_level_of_the_others() -> None:
    one, other, poor = ([curve([0.0, end], [0, 100])] for end in (0.4, 0.8, 0.1))
    first, second = Comparison({"one": one, "other": other, "poor": poor}).levels(at=())
    assert (first.level, first.speed_up_text("other", "step"), first.speed_up_text("poor", "step")) == (
        0.4,
        "2.00",
        "-",
    )
    assert (second.level, second.speed_up_text("other", "step"), second.speed_up_text("poor", "step")) == (
        0.1,
        "-",
        "0.25",
    )
    (level,) = Comparison({"poor": poor, "one": one, "other": other}).levels(at=())
    assert level.name == "10.0%, where poor and one and other came"


def test_levels_are_held_against_the_baseline() -> None:
    slow = [curve([0.0, 0.5], [0, 100 + seed]) for seed in range(3)]
    fast = [curve([0.0, 1.0], [0, 100], factor=1.5) for _ in range(3)]
    comparison = Comparison({"slow": slow, "fast": fast})
    half, ninety, final = comparison.levels()
    assert half.costs["slow"]["step"] == costs(100, 101, 102)
    assert half.costs["fast"]["step"] == costs(50, 50, 50)
    assert half.speed_ups["fast"]["step"].ratio == pytest.approx(101 / 50)
    assert half.speed_ups["fast"]["seconds"].ratio == pytest.approx(101 / 75)
    assert ninety.cost_text("slow", "step") == "not reached"
    assert str(ninety.speed_ups["fast"]["step"]) == "≥ 1.12"
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
    assert half.speed_up_text("fast", "step") == "≥ 3.30"  # one seed never got there
    assert final.cost_text("slow", "seconds") == "280 (160 to 480)"
    assert Comparison({"one": slow[:1], "other": fast[:1]}).levels()[0].speed_up_text("other", "step") == "2.00"


def test_finals_stand_beside_their_budgets() -> None:
    """Seeds share the examples of an evaluation, so that the interval is that of 20 of them; none is of width 0."""
    long = [replace(curve([0.0, 1.0], [10, 200]), examples=20) for _ in range(3)]
    short = [replace(curve([0.0, end], [10, 100]), examples=20) for end in (0.4, 0.5, 0.6)]
    comparison = Comparison({"long": long, "short": short})
    assert comparison.finals() == [
        ["long", "100.0% (100.0 to 100.0)", "83.9 to 100.0", "200", "400", "2,000"],
        ["short", "50.0% (40.0 to 60.0)", "29.9 to 70.1", "100", "200", "1,000"],
    ]
    assert comparison.mean_text([1.0, 1.0], comparison.num_examples("long")) == "100.0% [83.9, 100.0] (100.0 to 100.0)"
    assert comparison.short_of_baseline() == ["short"]
    assert Comparison({"short": short, "long": long}).short_of_baseline() == []
    assert Comparison({"long": short, "also": long}).short_of_baseline() == []
    assert Comparison({"long": [curve([0.0, 1.0], [10, 300])] * 2, "done": long}).short_of_baseline() == []
