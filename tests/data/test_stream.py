"""Streams of examples: what one may give."""

import pytest
import torch

from unmask import noise
from unmask.data.stream import examples_of, shuffled_index
from unmask.errors import UserError
from unmask.noise import Purpose
from unmask.types import CleanBatch


class Odd:
    """A stream that gives what it is made with."""

    def __init__(self, given: object) -> None:
        self.given = given

    def __getitem__(self, number: torch.Tensor) -> object:
        return self.given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((1, 2), r"Odd\[numbers\]: gave a tuple; give a CleanBatch"),
        (CleanBatch(x0=torch.zeros(1, 4).long(), prompt_mask=torch.zeros(1, 4).bool()), "give a row for each"),
    ],
    ids=["no batch", "one row"],
)
def test_a_stream_that_gives_something_else_is_named(given: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        examples_of(Odd(given), torch.arange(10))


@pytest.mark.parametrize("size", [37, 1024, 1_710_000])
@pytest.mark.parametrize("first", [0, 4090, 3 * 1_710_000 - 5])
def test_the_shuffled_order_is_the_permutation_number_by_number(size: int, first: int) -> None:
    """It is made of parts, whose ends these cross: near ones, and far ones, which are not kept."""
    for number in (first + torch.arange(20), first + torch.arange(0, 60_000, 7_000), first + torch.arange(0)):
        expected = noise.permute(number % size, size, 5, Purpose.SHUFFLE, number // size)
        assert torch.equal(shuffled_index(number, size, 5), expected)
    number = first + torch.tensor([7, 3, 7])
    kept = shuffled_index(number, size, 5)
    kept += 1  # what is kept of the order is not what is handed out
    assert torch.equal(shuffled_index(number, size, 5), kept - 1)
