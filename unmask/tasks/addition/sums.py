"""Sums of two numbers: drawn by keyed noise, with carry chains of a chosen length, and split into two sets.

A *carry chain* is a column whose digits sum to 10 or more, and the columns above it, one after the other, whose digits
sum to 9 and so pass its carry on. In a chain of c columns, a digit of the answer depends on digits c columns below.

Dimensions: n sums, D columns, the most significant first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unmask import noise
from unmask.errors import UserError
from unmask.noise import Purpose

Digits = Int[Tensor, "n D"]

_ATTEMPTS = 5000
_MOST_DRAWN = 2**17
"""Sums to draw before it is believed that there are no more, unless more are asked for."""


def add(a: Digits, b: Digits) -> Int[Tensor, "n D+1"]:
    """Adds numbers digit by digit; the answer has one column more."""
    carry = torch.zeros_like(a[:, 0])
    columns = []
    for column in reversed(range(a.shape[1])):
        total = a[:, column] + b[:, column] + carry
        columns.append(total % 10)
        carry = total // 10
    return torch.stack([carry, *reversed(columns)], dim=1)


def longest_chain(a: Digits, b: Digits) -> Int[Tensor, "n"]:
    """Returns the number of columns of each sum's longest carry chain; 0 where nothing is carried."""
    total = a + b
    length = longest = torch.zeros_like(total[:, 0])
    for column in reversed(range(total.shape[1])):
        passes = (total[:, column] == 9) & (length > 0)
        length = torch.where(total[:, column] >= 10, 1, torch.where(passes, length + 1, 0))
        longest = longest.maximum(length)
    return longest


_ANY, _MAKES_CARRY, _PASSES_CARRY, _CARRIES_NOTHING = range(4)


def _table() -> tuple[Int[Tensor, "4 2 2 100 2"], Int[Tensor, "4 2 2"]]:
    """Returns the pairs of digits that a column may have, and how many there are.

    By its kind, and by whether the digit of either number is its first, which is not 0.
    """
    kinds: list[Callable[[int], bool]] = [
        lambda total: True,
        lambda total: total >= 10,
        lambda total: total == 9,
        lambda total: total <= 9,
    ]
    pairs, counts = torch.zeros(4, 2, 2, 100, 2, dtype=torch.long), torch.zeros(4, 2, 2, dtype=torch.long)
    for kind, is_first, is_other_first in product(range(4), range(2), range(2)):
        found = [pair for pair in product(range(is_first, 10), range(is_other_first, 10)) if kinds[kind](sum(pair))]
        pairs[kind, is_first, is_other_first, : len(found)] = torch.tensor(found)
        counts[kind, is_first, is_other_first] = len(found)
    return pairs, counts


_PAIRS, _COUNTS = _table()


@dataclass(frozen=True)
class Sums:
    """An endless sequence of sums with random access: `sums[number]` gives the digits of both numbers.

    Args:
        digits: fewest and most digits of a number; how many it has is uniform (for a chain of c, at least c), and so
            are its digits.
        chain: shortest and longest of the longest carry chains, equally many sums of each, one after the other; None:
            as the digits fall.
        held_out_share: share of all sums that are held out. A hash of the two numbers, in whichever order, decides.
        is_held_out: True for the sums that are held out, False for the others.
        seed: keys all noise.
    """

    digits: tuple[int, int]
    chain: tuple[int, int] | None
    held_out_share: float
    is_held_out: bool
    seed: int

    def __getitem__(self, number: Int[Tensor, "n"]) -> tuple[Digits, Digits]:
        """Draws the sums of these numbers: again, with other noise, for as long as one is not as it should be.

        Raises:
            UserError: there seems to be none.
        """
        a = number.new_zeros(len(number), self.digits[1])
        b, left = a.clone(), torch.arange(len(number))
        for attempt in range(_ATTEMPTS):
            if not len(left):
                return a, b
            a[left], b[left] = self._draw(number[left], attempt)
            left = left[~self._is_valid(number[left], a[left], b[left])]
        side = "held-out" if self.is_held_out else "training"
        chain = "" if self.chain is None else f" whose longest carry chain has {int(self._chain(number[left])[0])}"
        share = "larger" if self.is_held_out else "smaller"
        fix = f"take other digits{' or chains' * bool(chain)}, or a {share} data.validation_ratio"
        raise UserError(f"data.digits={list(self.digits)}: found no {side} sum{chain}; {fix}")

    def distinct(self, count: int) -> tuple[Digits, Digits]:
        """Returns the first `count` sums without repeats, `a + b` and `b + a` being one; fewer if no more are found.

        Lengths of chains take turns, until one has no more sums.
        """
        drawn, most = count, max(count, _MOST_DRAWN)
        while True:
            a, b = self[torch.arange(drawn)]
            differs = (a != b).int().argmax(dim=1, keepdim=True)  # the first column that tells which is smaller
            ordered = torch.where(
                a.gather(1, differs) > b.gather(1, differs), torch.cat([b, a], 1), torch.cat([a, b], 1)
            )
            first = np.unique(ordered.to(torch.uint8).numpy(), axis=0, return_index=True)[1]
            if len(first) >= count or drawn == most:
                chosen = torch.from_numpy(first).sort().values[:count]
                return a[chosen], b[chosen]
            drawn = min(2 * drawn, most)

    def _chain(self, number: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        assert self.chain is not None
        shortest, longest = self.chain
        return shortest + number % (longest - shortest + 1)

    def _draw(self, number: Int[Tensor, "n"], attempt: int) -> tuple[Digits, Digits]:
        """Draws how many digits the numbers have, and the numbers; a chain is put at a place of its own."""
        least, most = self.digits
        u = noise.uniform(self.seed, Purpose.GENERATE, number.unsqueeze(1), attempt, torch.arange(most + 3))
        power = torch.arange(most - 1, -1, -1)
        if self.chain is None:
            fewest = torch.full_like(number, least)
            kind = torch.full((len(number), most), _ANY)
        else:
            chain = self._chain(number)
            fewest = chain.clamp(min=least)
        size = fewest.unsqueeze(1) + (u[:, :2] * (most - fewest + 1).unsqueeze(1)).long()
        if self.chain is not None:
            start = (u[:, 2] * (size.amin(dim=1) - chain + 1)).long().unsqueeze(1)
            is_passed = (power > start) & (power < start + chain.unsqueeze(1))
            kind = torch.where(power == start, _MAKES_CARRY, torch.where(is_passed, _PASSES_CARRY, _ANY))
            kind = torch.where(chain.unsqueeze(1) > 0, kind, _CARRIES_NOTHING)
        size, power = size.unsqueeze(1), power.unsqueeze(1)  # (n, 1, 2), (D, 1)
        first, other_first = ((power == size - 1) & (size > 1)).long().unbind(dim=2)
        column = kind, first, other_first
        pair = _PAIRS[(*column, (u[:, 3:] * _COUNTS[column]).long())]
        a, b = (pair * (power < size)).unbind(dim=2)
        return a, b

    def _is_valid(self, number: Int[Tensor, "n"], a: Digits, b: Digits) -> Bool[Tensor, "n"]:
        """True where the sum is of this set, and its longest chain as asked."""
        is_valid = self._is_in_held_out(a, b) == self.is_held_out
        return is_valid if self.chain is None else is_valid & (longest_chain(a, b) == self._chain(number))

    def _is_in_held_out(self, a: Digits, b: Digits) -> Bool[Tensor, "n"]:
        one, other = (_hash(number, self.seed) for number in (a, b))
        u = noise.uniform(self.seed, Purpose.SPLIT, one.minimum(other), one.maximum(other))
        return u < self.held_out_share


def _hash(number: Digits, seed: int) -> Int[Tensor, "n"]:
    parts = number.split(18, dim=1)  # as many digits as an int64 holds
    return noise.bits(seed, Purpose.SPLIT, *(part @ 10 ** torch.arange(part.shape[1]) for part in parts))
