"""An endless shuffled sequence of examples with random access.

Dimensions: n examples asked for, N examples in the data set.
"""

from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unmask import noise
from unmask.errors import UserError
from unmask.noise import Purpose
from unmask.types import AsyncCopy, CleanBatch, to_device

_CHUNK = 4096
"""Numbers that are shuffled at once and kept: a shuffle takes thousands of small operations, however few they are."""


@runtime_checkable
class ExampleStream(Protocol):
    """An endless sequence of examples, on the CPU. The same number always gives the same example."""

    def __getitem__(self, number: Int[Tensor, "n"]) -> CleanBatch: ...


@runtime_checkable
class EpochStream(ExampleStream, Protocol):
    """A stream over a data set, of which every epoch visits each example once."""

    @property
    def epoch_size(self) -> int:
        """Number of examples before the data set repeats."""
        ...


def examples_of(stream: ExampleStream, number: Int[Tensor, "n"]) -> CleanBatch:
    """Returns `stream[number]`, after a check of its shape.

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
    """Returns which of `size` examples stands at `number`: every epoch visits each once, in a new order."""
    if not len(number):
        return number
    first, last = (int(end) // _CHUNK for end in torch.aminmax(number))
    if last - first > 3:  # far apart, as a training does not ask for them
        return _shuffled(number, size, seed)
    return torch.cat([_chunk(each, size, seed) for each in range(first, last + 1)])[number - first * _CHUNK]


@lru_cache(maxsize=64)
def _chunk(number: int, size: int, seed: int) -> Int[Tensor, "n"]:
    return _shuffled(torch.arange(number * _CHUNK, (number + 1) * _CHUNK), size, seed)


def _shuffled(number: Int[Tensor, "n"], size: int, seed: int) -> Int[Tensor, "n"]:
    return noise.permute(number % size, size, seed, Purpose.SHUFFLE, number // size)


class Prefetcher:
    """Every row's next example, on the device before it is needed, so that a refill waits neither for it nor for data.

    Which rows took theirs is known on the device alone at first. The answer travels to the CPU while the device is busy
    with the next step; `restock` reads it then, and sends what follows in time for the refill after that.

    Args:
        stream: the examples.
        number: the number of the example that each row takes next, on the CPU.
        stride: how much further the one after that is.
        device: where the examples are to lie.
    """

    def __init__(self, stream: ExampleStream, number: Int[Tensor, "b"], *, stride: int, device: torch.device) -> None:
        self.number = number
        """Numbers of the examples in `clean`, on the CPU; replaced, never changed in place."""
        self._stride, self._device = stride, device
        self._taken: AsyncCopy | None = None
        self.clean = examples_of(stream, number).to(device)

    def take(self, is_taken: Bool[Tensor, "b"]) -> None:
        """Notes that these rows have taken theirs, without waiting for the device."""
        self._taken = AsyncCopy(is_taken)

    def restock(self, stream: ExampleStream) -> None:
        """Puts the next example where a row took its own, before any can be taken again."""
        if self._taken is None:
            return
        rows = self._taken.wait().nonzero().squeeze(1)
        if len(rows):
            number = self.number.index_add(0, rows, torch.full_like(rows, self._stride))
            fresh, place = examples_of(stream, number[rows]).to(self._device), to_device(rows, self._device)
            self.number = number
            self.clean = CleanBatch(
                x0=self.clean.x0.index_copy(0, place, fresh.x0),
                prompt_mask=self.clean.prompt_mask.index_copy(0, place, fresh.prompt_mask),
            )
        self._taken = None  # only now: a stream that fails is asked for the same examples again
