"""Wilson's interval against what defines it: the shares p whose test would not reject the observed one."""

import math

import pytest

from unmask.evaluation.statistics import wilson


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
