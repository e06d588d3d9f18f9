"""The examples that a pool's rows take next, ready on the device.

Dimensions: b rows of this process, n of them, L positions.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unmask.data.stream import ExampleStream, examples_of
from unmask.types import CleanBatch, send


class Upcoming:
    """For every row its next example, so that a refill waits neither for the device nor for data.

    Which rows took theirs is known on the device alone at first. The answer travels to the CPU while the device is busy
    with the next step; `restock` reads it then, and sends what follows in time for the refill after that.

    Args:
        stream: the examples.
        number: of the example that each row takes next, on the CPU.
        stride: how much further the one after that is.
        device: where the examples are to lie.
    """

    def __init__(self, stream: ExampleStream, number: Int[Tensor, "b"], *, stride: int, device: torch.device) -> None:
        self._number, self._stride, self._device = number, stride, device
        self._taken: _OnItsWay | None = None
        self.clean = examples_of(stream, number).to(device)

    def take(self, is_taken: Bool[Tensor, "b"]) -> None:
        """These rows have taken theirs."""
        self._taken = _OnItsWay(is_taken)

    def restock(self, stream: ExampleStream) -> None:
        """Puts the next one where a row took its own, before any can be taken again."""
        if self._taken is None:
            return
        rows = self._taken.arrived().nonzero().squeeze(1)
        self._taken = None
        if len(rows):
            self._number = self._number.index_add(0, rows, torch.full_like(rows, self._stride))
            fresh, place = examples_of(stream, self._number[rows]).to(self._device), send(rows, self._device)
            self.clean = CleanBatch(
                x0=self.clean.x0.index_copy(0, place, fresh.x0),
                prompt_mask=self.clean.prompt_mask.index_copy(0, place, fresh.prompt_mask),
            )


class _OnItsWay:
    """A tensor on its way to the CPU, which waits only for what was asked of the device before it set out."""

    def __init__(self, value: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._value = value
        if value.device.type == "cuda":
            self._value = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def arrived(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._value
