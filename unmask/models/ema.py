"""An exponential moving average of a model's parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Ema:
    """Averaged weights: `shadow <- d shadow + (1 - d) parameter`, `d = min(decay, (1 + n) / (10 + n))` at update n."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self._parameters = dict(model.named_parameters())
        first: dict[int, str] = {}
        self._names = {
            name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)
        }
        """Each parameter name to the name it is kept under; tied parameters have several names, kept once."""
        self.shadow: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the model's present weights."""
        self.num_updates += 1
        # A plain average of long memory would keep the random start for 1 / (1 - decay) updates; the smaller decay of
        # the first ones forgets it.
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(_local(self.shadow), _local(self._parameters), 1 - decay)

    @contextmanager
    @torch.no_grad()
    def apply(self) -> Iterator[None]:
        """Gives the model the averaged weights inside the context, and its own back afterwards."""
        raw = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._write(self.shadow)
        try:
            yield
        finally:
            self._write(raw)

    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.data.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of updates and the average, with tied parameters under each of their names."""
        return {
            "num_updates": self.num_updates,
            "shadow": {name: self.shadow[own] for name, own in self._names.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_updates = state["num_updates"]
        for name, value in self.shadow.items():
            value.copy_(state["shadow"][name])


def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Returns this process's part of each tensor: with FSDP2 the average, as the weights, is kept in shards."""
    return [value.to_local() if isinstance(value, DTensor) else value for value in tensors.values()]
