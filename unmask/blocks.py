"""Rows of N blocks of S positions each: L = N S."""

from unmask.errors import UserError


def check_block_size(size: int, length: int, key: str) -> None:
    """That blocks of `size` positions fill a row of `length`; `key` is the setting that says the size.

    Raises:
        UserError: they do not; names the nearest sizes that do.
    """
    if length % size == 0:
        return
    divisors = [n for n in range(1, length + 1) if length % n == 0]
    nearest = [max(n for n in divisors if n < size), *[n for n in divisors if n > size][:1]]
    raise UserError(
        f"{key}={size} does not divide the {length} positions of a row; use {' or '.join(map(str, nearest))}"
    )
