"""Intervals and tests against what defines them: brute force over all outcomes, and simulated coverage."""

import itertools
import math

import numpy as np
import pytest

from unmask.evaluation.statistics import mcnemar, paired_difference, root_mean_square, share_text, share_words, wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (7, 10), (600, 1319)])
def test_the_ends_are_where_the_score_test_turns(successes: int, n: int) -> None:
    share = successes / n
    for end in wilson(successes, n):
        assert 0 <= end <= 1
        if end not in (0, 1):
            assert abs(share - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(1.96)
    low, high = wilson(successes, n)
    assert low <= share <= high
    assert low < high


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (2, 1), (-1, 3)])
def test_no_share(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="needs 0 <= successes <= n"):
        wilson(successes, n)


def test_a_share_in_words() -> None:
    assert share_text(219, 500) == "43.8% [39.5, 48.2]"
    assert share_text(500, 500) == "100.0% [99.2, 100.0]"
    assert share_text(0, 1) == "0.0% [0.0, 79.3]"
    assert share_words(2, 6) == "33.3% (95% interval 9.7% to 70.0%)"


def test_a_share_of_shares_is_within_its_interval_often_enough() -> None:
    """n problems, each with a share of its own between 0 and 1: their sum is as good as a count."""
    rng = np.random.default_rng(0)
    sums = rng.beta(0.2, 0.3, size=(4000, 25)).sum(axis=1)
    ends = [wilson(each, 25) for each in sums]
    assert np.mean([low <= 0.4 <= high for low, high in ends]) > 0.95
    assert wilson(3, 7)[0] < wilson(3.5, 7)[0] < wilson(4, 7)[0]


def test_mcnemar_is_the_share_of_sign_flips_at_least_as_far_apart() -> None:
    """All 2^n ways in which n examples that one model alone has right could be either's."""
    for n in range(11):
        gaps = [abs(sum(signs)) for signs in itertools.product((-1, 1), repeat=n)]
        for one in range(n + 1):
            expected = sum(gap >= abs(n - 2 * one) for gap in gaps) / len(gaps)
            assert mcnemar(one, n - one) == pytest.approx(expected, abs=1e-12)


def test_mcnemar_of_many_examples() -> None:
    """Beyond what floats hold: 2^3000, with the normal approximation within its error."""
    assert mcnemar(1500, 1500) == 1
    z = (1600 - 1400 - 1) / math.sqrt(3000)  # with its correction for continuity
    assert mcnemar(1600, 1400) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert mcnemar(3000, 0) == 0 or mcnemar(3000, 0) < 1e-300


def test_the_difference_of_examples_is_weighted() -> None:
    found = paired_difference([1.0, 3.0], [2.0, 3.0], [3.0, 1.0])
    assert found.value == pytest.approx(0.75)
    assert found.interval is not None
    assert paired_difference([1.0], [2.0]).interval is None
    same = paired_difference([0.5] * 9, [0.5] * 9)
    assert (same.value, same.interval) == (0.0, (0.0, 0.0))
    assert paired_difference([1.0, 0.0], [1.0, 1.0]) == paired_difference([1.0, 0.0], [1.0, 1.0])


@pytest.mark.parametrize("kind", ["right or wrong", "nats"])
def test_the_paired_interval_covers_the_truth(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 trials with 60 examples whose difficulty both models share; 1,000 resamples do here.

    0.93 of 300 has a standard error of 1.3 %: the numbers are always the same ones.
    """
    monkeypatch.setattr("unmask.evaluation.statistics.RESAMPLES", 1000)
    rng = np.random.default_rng(3)
    inside, apart = 0, 0
    for trial in range(300):
        hard = rng.normal(0, 1, 60)
        if kind == "nats":
            one, other = hard + rng.normal(0, 0.3, 60), hard + 0.1 + rng.normal(0, 0.3, 60)
            truth = 0.1
        else:  # right where luck is less than 0.5 and 0.7
            luck = rng.random(60)
            one, other = (luck < 0.5) * 1.0, np.where(rng.random(60) < 0.3, rng.random(60) < 0.7, luck < 0.7) * 1.0
            truth = 0.2
        low, high = paired_difference(one.tolist(), other.tolist(), seed=trial).interval
        inside += low <= truth <= high
        spread = 1.96 * math.sqrt(one.var() / 60 + other.var() / 60)
        apart += (high - low) / 2 < spread
    assert inside / 300 >= 0.93
    assert apart / 300 > 0.95  # narrower than if the examples were not the same


def test_the_root_mean_square_of_errors_is_unknown_if_one_is() -> None:
    assert root_mean_square([3.0, 4.0]) == pytest.approx(12.5**0.5)
    assert root_mean_square([3.0, None]) is None
    assert root_mean_square([]) is None
