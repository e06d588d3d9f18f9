"""A density that is fitted, while training, to the times at which the model still learns."""

from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from unmask.masking.densities import TimeConfig, mixed
from unmask.masking.time import UNIFORM, Density
from unmask.peers import ALONE, Peers


class Adaptive:
    """q(t) in proportion to how fast the mean NLL of masked tokens falls at t, mixed with a uniform share.

    Times are counted in C cells. Every `every` steps the mean NLL of each cell enters two running averages, a fast one
    and a slow one; where it falls, the slow one lies above. Their positive difference is the new shape. The NELBO is
    the integral of that NLL over t, so that mass goes where it sinks. Until there is a difference, q is uniform.

    A density holds from one step after the window that it was made of: a batch may be drawn one step ahead.

    Args:
        cells: C.
        every: steps of a window.
        uniform: share of the uniform density.
        memory: weight of the past in the slow average; the fast one has its square.
        peers: the processes that share the batch: all fit one density.
    """

    learns = True

    def __init__(self, *, cells: int, every: int, uniform: float, memory: float, peers: Peers = ALONE) -> None:
        self.cells, self.every, self.uniform, self.memory, self.peers = cells, every, uniform, memory, peers
        self._now = self._next = UNIFORM
        self._from_step = 0
        zero = torch.zeros(cells, dtype=torch.float64)
        self._sum, self._number = zero, zero
        self._averages = torch.full((2, cells), torch.nan, dtype=torch.float64)

    def at(self, step: int) -> Density:
        return self._next if step >= self._from_step else self._now

    def observe(self, step: int, t: Float[Tensor, "b N"], nll: Float[Tensor, "b N"]) -> None:
        cell = (t * self.cells).ceil().long().clamp(min=1, max=self.cells).flatten() - 1
        values, is_known = nll.double().flatten(), nll.isfinite().double().flatten()
        values = values.where(is_known > 0, 0.0)
        sums = torch.zeros(2, self.cells, dtype=torch.float64, device=nll.device)
        sums.index_add_(1, cell.to(nll.device), torch.stack([values, is_known]))
        self._sum, self._number = self._sum.to(nll.device) + sums[0], self._number.to(nll.device) + sums[1]
        if (step + 1) % self.every == 0:
            self._refit(step + 2)

    def _refit(self, from_step: int) -> None:
        total, number = self._totals()
        mean = total / number  # nan where nothing was drawn: the averages stay
        self._sum = self._number = torch.zeros(self.cells, dtype=torch.float64)
        memory = torch.tensor([self.memory**2, self.memory], dtype=torch.float64).unsqueeze(1)
        moved = memory * self._averages + (1 - memory) * mean
        moved = torch.where(self._averages.isnan(), mean, moved)
        self._averages = torch.where(mean.isnan(), self._averages, moved)
        fast, slow = self._averages
        falling = (slow - fast).nan_to_num(0.0).clamp(min=0)
        fitted = mixed(Density(falling), UNIFORM, self.uniform) if falling.sum() > 0 else UNIFORM
        self._now, self._next, self._from_step = self._next, fitted, from_step

    def _totals(self) -> Float[Tensor, "2 C"]:
        return self.peers.sum(torch.stack([self._sum, self._number]).cpu())

    def state_dict(self) -> dict[str, Any]:
        total, number = self._totals()
        return {
            "now": self._now.mass.clone(),  # both may be one tensor, which no file holds twice
            "next": self._next.mass.clone(),
            "from_step": self._from_step,
            "sum": total.clone(),
            "number": number.clone(),
            "averages": self._averages,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._now, self._next = Density(state["now"]), Density(state["next"])
        self._from_step = state["from_step"]
        self._averages = state["averages"]
        share = 1.0 if self.peers.is_main else 0.0  # the sums are of all processes
        self._sum, self._number = share * state["sum"], share * state["number"]


class AdaptiveConfig(TimeConfig):
    """Settings of `Adaptive`."""

    name: str = "adaptive"
    cells: int = Field(16, ge=2, le=256, description="cells of (0, 1] in which the NLL is followed")
    every: int = Field(25, ge=2, description="steps between two fits")
    uniform: float = Field(0.3, gt=0, le=1, description="share of the uniform density")
    memory: float = Field(0.8, gt=0, lt=1, description="weight of the past in the slow average")

    def build(self, peers: Peers = ALONE) -> Adaptive:
        return Adaptive(cells=self.cells, every=self.every, uniform=self.uniform, memory=self.memory, peers=peers)
