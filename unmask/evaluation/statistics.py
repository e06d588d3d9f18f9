"""Confidence intervals, and comparisons of two models on the same examples.

Dimensions: n examples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


_Z = 1.96  # of intervals of 95 %


def wilson(successes: int | float, n: int) -> tuple[float, float]:
    """Computes Wilson's score interval of 95 % for a binomial share p = successes / n; z = 1.96.

    (p + z²/2n ± z √(p(1 - p)/n + z²/4n²)) / (1 + z²/n). Wilson 1927. Unlike p ± z √(p(1 - p)/n) it stays within [0, 1]
    and has a width at p = 0 and 1. `successes` may be the sum of n values between 0 and 1, such as each problem's own
    share: their variance is p(1 - p) at most, so that the interval is wide enough.

    Raises:
        ValueError: not 0 <= successes <= n, or n = 0.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes={successes}, n={n}: needs 0 <= successes <= n and n >= 1")
    share, shift = successes / n, _Z * _Z / n
    center = share + shift / 2
    half = _Z * math.sqrt(share * (1 - share) / n + shift / (4 * n))
    return max(0.0, (center - half) / (1 + shift)), min(1.0, (center + half) / (1 + shift))


def share_text(successes: int | float, n: int) -> str:
    """Formats a share with Wilson's 95 % interval: `43.8% [39.5, 48.2]`. It has a width at 0 and 100 % as well."""
    low, high = wilson(successes, n)
    return f"{successes / n:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def share_words(successes: int | float, n: int) -> str:
    """Formats the same where nothing else says what it is: `43.8% (95% interval 39.5% to 48.2%)`."""
    low, high = wilson(successes, n)
    return f"{successes / n:.1%} (95% interval {low:.1%} to {high:.1%})"


def root_mean_square(errors: Sequence[float | None]) -> float | None:
    """Computes the root mean square of standard errors; None if there are none, or one is unknown."""
    known = [error for error in errors if error is not None]
    return math.sqrt(math.fsum(error**2 for error in known) / len(known)) if 0 < len(known) == len(errors) else None


def mcnemar(only_one: int, only_other: int) -> float:
    """Computes the exact two-sided p-value of McNemar's test (1947).

    Of the examples that exactly one of two models has right, `only_one` are the one's and `only_other` the other's. If
    both were equally good, each would be either's with probability 1/2: twice the smaller tail of that binomial.
    """
    n, least = only_one + only_other, min(only_one, only_other)
    tail = sum(math.comb(n, k) for k in range(least + 1))  # integers: no power of two is lost at any n
    return min(1.0, 2 * tail / 2**n)


RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """The mean of a difference between two models on the same examples."""

    value: float
    interval: tuple[float, float] | None
    """The 95 % interval; None for a single example."""


def paired_difference(
    one: Sequence[float], other: Sequence[float], weight: Sequence[float] | None = None, *, seed: int = 0
) -> Difference:
    """Estimates `other - one`, a mean over the same examples, with a paired bootstrap (Efron 1979).

    Examples are drawn with replacement, `RESAMPLES` times n of them, each with both models' values; the interval has
    the 2.5 % and 97.5 % points of the means. It is widened by sqrt(n / (n - 1)), as the bootstrap's variance is too
    small by that. The draws are the same for the same n.

    Args:
        one: a value of each example.
        other: the same of the other model.
        weight: of each example, such as its number of tokens; the means are `sum(weight x value) / sum(weight)`.
        seed: keys the draws.
    """
    gap = np.asarray(other, dtype=np.float64) - np.asarray(one, dtype=np.float64)
    counted = np.ones_like(gap) if weight is None else np.asarray(weight, dtype=np.float64)
    mean = float((counted * gap).sum() / counted.sum())
    n = len(gap)
    if n < 2:
        return Difference(mean, None)
    rng = np.random.default_rng([seed, n])
    means = np.empty(RESAMPLES)
    # Few at a time: all the draws together may be larger than the memory.
    at_once = max(1, 2_000_000 // n)
    for start in range(0, RESAMPLES, at_once):
        drawn = rng.integers(n, size=(min(at_once, RESAMPLES - start), n))
        total = counted[drawn].sum(axis=1)
        sums = (counted * gap)[drawn].sum(axis=1)
        means[start : start + len(drawn)] = np.divide(sums, total, out=np.full(len(drawn), mean), where=total > 0)
    low, high = mean + (np.quantile(means, (0.025, 0.975)) - mean) * math.sqrt(n / (n - 1))
    return Difference(mean, (float(low), float(high)))


def student(degrees: float) -> float:
    """Returns the 97.5 % point of Student's t, or a little more: `degrees` is rounded down, to 20 at most."""
    return _STUDENT[min(math.floor(degrees), len(_STUDENT)) - 1]
