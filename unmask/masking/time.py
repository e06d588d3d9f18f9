"""Times: `t` in (0, 1] is the masked fraction of a block's maskable positions. t = 1 is all masked.

A density over times is an object with `icdf`; `stratified` draws from it.
Dimensions: b rows of this process, N blocks of a row (1 in plain diffusion).
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from unmask import noise
from unmask.blocks import blocks_of
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


def stratified(
    q: TimeDensity, rows: Int[Tensor, "b"], global_batch: int, seed: int, step: int, num_blocks: int = 1
) -> Float[Tensor, "b N"]:
    """Times for the global batch's rows `rows` in `step`: one draw in each of `global_batch x N` strata of equal mass.

    Every block's time has density q, and the batch covers it evenly, which lowers the variance of the loss. Which
    block has which stratum changes with the step, so that micro-batches and processes all see the whole range.
    """
    block = blocks_of(rows, num_blocks)
    total = global_batch * num_blocks
    stratum = noise.permute(block, total, seed, Purpose.TIME, step)
    u = (stratum + 1 - noise.uniform(seed, Purpose.TIME, step, block)) / total  # in (0, 1]
    return q.icdf(u)


def masked_count(t: Float[Tensor, "*b"], num_maskable: Int[Tensor, "*b"]) -> Int[Tensor, "*b"]:
    """n = ceil(t L_b) of a block's L_b maskable positions: for uniform t, uniform on {1, .., L_b}."""
    return (t * num_maskable).ceil().long().clamp(min=1).minimum(num_maskable)
