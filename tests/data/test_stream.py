"""Streams of examples: what one may give."""

import pytest
import torch

from unmask.data.stream import examples_of
from unmask.errors import UserError
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
