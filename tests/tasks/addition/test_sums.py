import pytest
import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.tasks.addition.sums import Sums, add, longest_chain


def numbers(digits: Tensor) -> list[int]:
    return [int("".join(map(str, row))) for row in digits.tolist()]


def chain_of(a: int, b: int) -> int:
    """The definition: the most columns that one carry runs through, from where it is made."""
    longest = 0
    for start in range(len(str(max(a, b)))):
        columns = [(a // 10**i % 10) + (b // 10**i % 10) for i in range(start, 110)]
        if columns[0] >= 10:
            passing = next(i for i, total in enumerate(columns[1:]) if total != 9)
            longest = max(longest, 1 + passing)
    return longest


def sums(
    digits: tuple[int, int] = (1, 4),
    chain: tuple[int, int] | None = None,
    *,
    held_out: bool = False,
    share: float = 0.1,
    seed: int = 0,
) -> Sums:
    return Sums(digits, chain, share, held_out, seed)


@pytest.mark.parametrize("digits", [(1, 4), (30, 40)])
def test_sums_and_chains_are_those_of_whole_numbers(digits: tuple[int, int]) -> None:
    for chain in (None, (0, digits[1])):
        a, b = sums(digits, chain)[torch.arange(300)]
        for x, y, c, length in zip(numbers(a), numbers(b), numbers(add(a, b)), longest_chain(a, b), strict=True):
            assert x + y == c
            assert length == chain_of(x, y)


def test_chains_are_as_long_as_asked_one_after_the_other() -> None:
    a, b = sums((2, 9), (3, 7))[torch.arange(50)]
    assert longest_chain(a, b).tolist() == [3, 4, 5, 6, 7] * 10
    assert longest_chain(*sums((9, 9), (0, 0))[torch.arange(50)]).tolist() == [0] * 50


def test_numbers_have_as_many_digits_as_asked_and_all_digits_occur() -> None:
    a, b = sums((2, 4))[torch.arange(4000)]
    for operand in (a, b):
        sizes = torch.tensor([len(str(number)) for number in numbers(operand)])
        counts = sizes.bincount(minlength=5)
        assert counts[:2].tolist() == [0, 0]
        assert counts[2:].min() > 1200  # a third each
        assert operand[:, -1].bincount(minlength=10).min() > 320  # a tenth each
        assert operand[sizes == 4][:, 0].bincount(minlength=10).gt(0).tolist() == [False] + [True] * 9


def test_no_sum_is_trained_on_and_held_out_in_either_order() -> None:
    """Of few digits, so that nearly every sum is drawn."""
    found = {}
    for held_out in (False, True):
        a, b = sums((2, 2), held_out=held_out, share=0.3)[torch.arange(20_000)]
        found[held_out] = {tuple(sorted(pair)) for pair in zip(numbers(a), numbers(b), strict=True)}
    assert not found[True] & found[False]
    every = 90 * 91 // 2
    assert len(found[True] | found[False]) > 0.9 * every
    assert len(found[True]) / every == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("chain", [None, (0, 1), (0, 2)])
def test_distinct_sums_are_the_first_of_those_drawn_and_all_that_there_are(chain: tuple[int, int] | None) -> None:
    drawn = sums((2, 2), chain, held_out=True)
    expected: dict[frozenset[int], tuple[int, int]] = {}
    for a, b in zip(*map(numbers, drawn[torch.arange(20_000)]), strict=True):  # far more than it takes to meet all
        expected.setdefault(frozenset((a, b)), (a, b))
    for count in (2, 100, len(expected), 5000):
        found = [*zip(*map(numbers, drawn.distinct(count)), strict=True)]
        assert found == [*expected.values()][:count]


def test_sums_of_many_digits_are_those_drawn() -> None:
    drawn = sums((8, 9), (0, 4), held_out=True)
    for one, other in zip(drawn.distinct(300), drawn[torch.arange(300)], strict=True):
        assert torch.equal(one, other)


def test_a_sum_is_a_function_of_its_number_and_the_seed() -> None:
    number = torch.tensor([5, 2**39, 17])
    a, b = sums((3, 25), (0, 9))[number]
    for place in range(3):
        alone = sums((3, 25), (0, 9))[number[place : place + 1]]
        assert torch.equal(alone[0][0], a[place])
        assert torch.equal(alone[1][0], b[place])
    assert not torch.equal(sums((3, 25), (0, 9), seed=1)[number][0], a)


def test_where_no_sum_is_left_it_says_so() -> None:
    with pytest.raises(UserError, match=r"data.digits=\[1, 1\]: found no held-out sum whose longest carry chain has 1"):
        sums((1, 1), (1, 1), held_out=True, share=0.0)[torch.arange(2)]
