"""Times: `t` in (0, 1] is the masked fraction of a block's maskable positions. t = 1 is all masked.

A `Density` is what times are drawn from.
Dimensions: b rows of this process, N blocks of a row (1 in plain diffusion), C cells of a table.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmask import noise
from unmask.blocks import blocks_of
from unmask.errors import UserError
from unmask.noise import Purpose


class Density:
    """A density q on (0, 1] that is constant within each of C equal cells.

    All its functions are exact for these steps: a formula is no better than its table, but sampling, density and
    weights always agree. One cell is the uniform density, to the last bit.

    Args:
        mass: of each cell, up to a common factor.

    Raises:
        UserError: no mass, or negative or non-finite mass.
    """

    def __init__(self, mass: Float[Tensor, "C"]) -> None:
        total = mass.double().sum()
        if not (torch.isfinite(total) and total > 0 and (mass >= 0).all()):
            raise UserError(f"a density of times must have mass, none of it negative; its {len(mass)} cells do not")
        self.mass = mass.double() / total
        self._cdf = torch.cat([torch.zeros(1, dtype=torch.float64, device=mass.device), self.mass.cumsum(dim=0)])
        self._cdf[-1] = 1

    @property
    def cells(self) -> int:
        return len(self.mass)

    @property
    def mean(self) -> float:
        """E[t]: the share that is masked."""
        middle = (torch.arange(self.cells, dtype=torch.float64, device=self.mass.device) + 0.5) / self.cells
        return float((self.mass * middle).sum())

    def density(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """q(t), for t in (0, 1]."""
        cell = (t * self.cells).ceil().long().clamp(min=1, max=self.cells) - 1
        return self.mass[cell] * self.cells

    def cdf(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The mass of (0, t]."""
        place = t.double() * self.cells
        cell = place.long().clamp(max=self.cells - 1)
        return self._cdf[cell] + (place - cell) * self.mass[cell]

    def icdf(self, u: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The time below which lies the mass u: for u in (0, 1], one that has density."""
        u = u.double()
        cell = torch.searchsorted(self._cdf[1:], u.contiguous()).clamp(max=self.cells - 1)
        within = (u - self._cdf[cell]) / self.mass[cell].clamp(min=torch.finfo(torch.float64).tiny)  # u = 0 has no mass
        return (cell + within.clamp(max=1)) / self.cells

    @property
    def mirrored(self) -> "Density":
        """That of 1 - t: the share that is revealed."""
        return Density(self.mass.flip(0))

    def resized(self, cells: int) -> "Density":
        """In so many cells, each with the mass that lies there now."""
        edges = torch.arange(cells + 1, dtype=torch.float64, device=self.mass.device) / cells
        return Density(self.cdf(edges).diff().clamp(min=0))  # rounding

    def to(self, device: torch.device) -> "Density":
        return self if self.mass.device == device else Density(self.mass.to(device))


UNIFORM = Density(torch.ones(1, dtype=torch.float64))


def stratified(
    q: Density, rows: Int[Tensor, "b"], global_batch: int, seed: int, step: int, num_blocks: int = 1
) -> Float[Tensor, "b N"]:
    """Times for the global batch's rows `rows` in `step`: one draw in each of `global_batch x N` strata of equal mass.

    Every block's time has density q, and the batch covers it evenly, which lowers the variance of the loss (MDLM's
    code calls this antithetic). Which block has which stratum changes with the step, so that micro-batches and
    processes all see the whole range.
    """
    block = blocks_of(rows, num_blocks)
    total = global_batch * num_blocks
    stratum = noise.permute(block, total, seed, Purpose.TIME, step)
    u = (stratum + 1 - noise.uniform(seed, Purpose.TIME, step, block)) / total  # in (0, 1]
    return q.icdf(u)


def masked_count(t: Float[Tensor, "*b"], num_maskable: Int[Tensor, "*b"]) -> Int[Tensor, "*b"]:
    """n = ceil(t L_b) of a block's L_b maskable positions: for uniform t, uniform on {1, .., L_b}.

    Raises:
        UserError: a time outside (0, 1].
    """
    if not ((t > 0) & (t <= 1)).all():
        raise UserError(f"times lie in (0, 1], but some are in [{t.min():g}, {t.max():g}]; mend the density")
    return (t * num_maskable).ceil().long().clamp(min=1).minimum(num_maskable)
