"""How sure a share is."""

import math


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval for a binomial share p = successes / n; z = 1.96 makes it 95%.

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
