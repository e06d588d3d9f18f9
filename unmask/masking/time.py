"""Times: `t` in (0, 1] is the masked fraction of a row's maskable positions. t = 1 is all masked.

A density over times is an object with `icdf`; `stratified` draws from it.
Dimensions: b rows of this process.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from unmask import noise
from unmask.noise import Purpose


@runtime_checkable
class TimeDensity(Protocol):
    """A density q on (0, 1]."""

    def icdf(self, u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The time below which q has mass u, for u in (0, 1]."""
        ...


class UniformTime:
    """q(t) = 1."""

    def icdf(self, u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return u


def stratified(q: TimeDensity, rows: Int[Tensor, "b"], global_batch: int, seed: int, step: int) -> Float[Tensor, "b"]:
    """Times for the global batch's rows `rows` in `step`: one draw in each of `global_batch` strata of equal mass.

    Every row's time has density q, and the batch covers it evenly, which lowers the variance of the loss. Which
    row has which stratum changes with the step, so that micro-batches and processes all see the whole range.
    """
    stratum = noise.permute(rows, global_batch, seed, Purpose.TIME, step)
    u = (stratum + 1 - noise.uniform(seed, Purpose.TIME, step, rows)) / global_batch  # in (0, 1]
    return q.icdf(u)


def masked_count(t: Float[Tensor, "b"], num_maskable: Int[Tensor, "b"]) -> Int[Tensor, "b"]:
    """n = ceil(t L_eff): for uniform t, uniform on {1, .., L_eff}."""
    return (t * num_maskable).ceil().long().clamp(min=1).minimum(num_maskable)
