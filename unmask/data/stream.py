"""An endless shuffled sequence of examples with random access.

Dimensions: n examples asked for, N examples in the data set.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from unmask import noise
from unmask.errors import UserError
from unmask.noise import Purpose
from unmask.types import CleanBatch


@runtime_checkable
class ExampleStream(Protocol):
    """The n-th example of an endless sequence, on the CPU. The same number always gives the same example."""

    def __getitem__(self, number: Int[Tensor, "n"]) -> CleanBatch: ...


@runtime_checkable
class EpochStream(ExampleStream, Protocol):
    """A stream over a data set, of which every epoch visits each example once."""

    @property
    def epoch_size(self) -> int:
        """Examples before the data set repeats."""
        ...


def examples_of(stream: ExampleStream, number: Int[Tensor, "n"]) -> CleanBatch:
    """`stream[number]`.

    Raises:
        UserError: it is no batch of as many examples.
    """
    clean = stream[number]
    if not isinstance(clean, CleanBatch):
        raise UserError(f"{type(stream).__name__}[numbers]: gave a {type(clean).__name__}; give a CleanBatch")
    if len(clean) != len(number) or clean.prompt_mask.shape != clean.x0.shape:
        raise UserError(
            f"{type(stream).__name__}[numbers]: gave x0 {tuple(clean.x0.shape)} and prompt_mask "
            f"{tuple(clean.prompt_mask.shape)} for {len(number)} numbers; give a row for each"
        )
    return clean


def shuffled_index(number: Int[Tensor, "n"], size: int, seed: int) -> Int[Tensor, "n"]:
    """Which of `size` examples stands at `number`: every epoch visits each once, in a new order."""
    epoch = number // size
    return noise.permute(number % size, size, seed, Purpose.SHUFFLE, epoch)
