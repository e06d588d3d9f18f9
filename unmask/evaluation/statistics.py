"""Confidence intervals."""

import math

_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Computes Wilson's score interval for a binomial share p = successes / n; z = 1.96 makes it 95%.

    (p + z²/2n ± z √(p(1 - p)/n + z²/4n²)) / (1 + z²/n). Wilson 1927. Unlike p ± z √(p(1 - p)/n) it stays within [0, 1]
    and has a width at p = 0 and 1.

    Raises:
        ValueError: not 0 <= successes <= n, or n = 0.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes={successes}, n={n}: needs 0 <= successes <= n and n >= 1")
    share, shift = successes / n, z * z / n
    center = share + shift / 2
    half = z * math.sqrt(share * (1 - share) / n + shift / (4 * n))
    return max(0.0, (center - half) / (1 + shift)), min(1.0, (center + half) / (1 + shift))


def student(degrees: float) -> float:
    """Returns the 97.5 % point of Student's t, or a little more: `degrees` is rounded down, to 20 at most."""
    return _STUDENT[min(math.floor(degrees), len(_STUDENT)) - 1]
