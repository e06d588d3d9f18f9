"""PUMA, Progressive UnMAsking (2602.10314): training on the masks that decoding meets.

A pool of rows is kept, each at its own stage. Every step trains on the pool as it stands; then each row is unmasked a
little further, in the order of the model's own confidences from that same forward pass, with its true tokens. A row
that is done is refilled with a new example, so there is no second forward pass and no idle row.

Nothing here looks at how well a hidden token is predicted, and no count depends on hidden content: given what is
visible, the hidden tokens keep their distribution under the data, so the minimiser of the loss is still the true
conditional.

In blocks (2503.09573), every block of a row has a stage of its own, and what is said of a row above holds for a block;
a row is done when all its blocks are.

Dimensions: B rows of the global batch, b rows of this process, N blocks of a row (1 in plain diffusion), K stages.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Int
from pydantic import AfterValidator, Field, SerializeAsAny, field_validator
from torch import Tensor

from unmask import noise
from unmask.blocks import blocks_of, count_blocks, in_blocks
from unmask.errors import require
from unmask.masking import time, weights
from unmask.masking.pool import Pool, PoolConfig, PoolRows, new_rows, parallel_rule
from unmask.masking.process import ProcessContext, RowShard, score_masked
from unmask.masking.time import UNIFORM, Density, DensityConfig, Uniform
from unmask.masking.uniform import TIME
from unmask.noise import Purpose
from unmask.types import CleanBatch, MaskedBatch, TokenStats


def _check_schedule(schedule: list[tuple[int, int]]) -> list[tuple[int, int]]:
    for (earlier, _), (later, _) in pairwise(schedule):
        if later <= earlier:
            raise ValueError(
                f"steps must increase, but {later} follows {earlier}; write [[step, K], ...] in order of step"
            )
    return schedule


StageSchedule = Annotated[
    list[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]], AfterValidator(_check_schedule)
]


class PumaPool(Pool):
    """The masking process: a pool that follows the model, stage by stage.

    Args:
        num_stages: K. A row passes through about K masks, from all masked to almost none.
        stage_schedule: [[step, K], ...]: from that step on, K changes. Rows keep their masks and are re-bucketed.
        time: density of the masked fraction: the K stages have equal mass, so that the pool's rows follow it.
        threshold: with it, positions whose top-1 probability exceeds it are revealed at once, whatever the stage.
        factor: in place of it, `reveal.Factor`.
        entropy_bound: in place of it, `reveal.EntropyBound`; needs the confidence `neg_entropy`.
        confidence: what orders the reveals: `prob`, `margin`, `neg_entropy` or `random`.
        block_size: S. Each block of S positions passes through stages of its own.
    """

    class Config(PoolConfig):
        name: str = "puma"
        num_stages: int = Field(8, ge=1, description="K: masks that a row passes through")
        stage_schedule: StageSchedule = Field(
            [], description="[[step, K], ...]: from each step on, K changes; steps increase"
        )
        time: SerializeAsAny[DensityConfig] = Field(Uniform(), description=f"{TIME}: stages are of equal mass")

        @field_validator("time", mode="before")
        @classmethod
        def _read_time(cls, value: Any) -> Any:
            return time.read(value, "process.time")

    def __init__(
        self,
        *,
        mask_id: int,
        shard: RowShard,
        num_stages: int = 8,
        stage_schedule: Sequence[Sequence[int]] | None = None,
        time: Density = UNIFORM,
        threshold: float | None = None,
        factor: float | None = None,
        entropy_bound: float | None = None,
        confidence: str = "prob",
        block_size: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            mask_id=mask_id,
            shard=shard,
            also=parallel_rule(confidence, threshold=threshold, factor=factor, entropy_bound=entropy_bound),
            confidence=confidence,
            block_size=block_size,
            seed=seed,
            device=device,
        )
        require(num_stages >= 1, "num_stages", num_stages, "1 or more")
        self.num_stages = num_stages
        self.stage_schedule = dict(_check_schedule([(step, k) for step, k in stage_schedule or []]))
        self.revealed_share = time.mirrored.to(self.device)

    @classmethod
    def from_config(cls, config: Config, context: ProcessContext) -> "PumaPool":
        count_blocks(context.tokens.length, config.block_size)  # refuses what does not divide
        return cls(
            mask_id=context.tokens.mask_id,
            shard=context.shard,
            seed=context.seed,
            device=context.device,
            num_stages=config.num_stages,
            stage_schedule=config.stage_schedule,
            time=config.time.density(),
            threshold=config.threshold,
            factor=config.factor,
            entropy_bound=config.entropy_bound,
            confidence=config.confidence,
            block_size=config.block_size,
        )

    def observe(self, batch: MaskedBatch, stats: TokenStats) -> None:
        super().observe(batch, stats)
        if self.step in self.stage_schedule:
            self._change_num_stages(self.stage_schedule[self.step])

    def _count(self, pool: PoolRows) -> Int[Tensor, "b N"]:
        num_revealed = pool.num_revealed
        target = self._draw_num_revealed(
            pool.num_maskable, pool.stage + 1, Purpose.TARGET, pool.example.unsqueeze(1), pool.block_visit
        )
        return target.maximum(num_revealed + 1) - num_revealed

    def _advance(self, pool: PoolRows) -> Bool[Tensor, "b N"]:
        stage = pool.stage + 1
        if self.also is not None:
            # What jumped ahead skips stages; never back, or a block with L_b < K would not leave its stage.
            stage = stage.maximum(self._stage_of(pool))
        pool.stage = stage.clamp(max=self.num_stages)
        return stage >= self.num_stages

    def _draw_num_revealed(
        self, num_maskable: Int[Tensor, "b N"], stage: Int[Tensor, "b N"], purpose: Purpose, *keys: Int[Tensor, "b ..."]
    ) -> Int[Tensor, "b N"]:
        """`round(r L_b)`, at most L_b - 1; below r lies the mass u ~ U[stage / K, (stage + 1) / K).

        Under uniform times r = u.
        """
        r = self.revealed_share.icdf((stage + noise.uniform(self.seed, purpose, *keys)) / self.num_stages)
        return (r * num_maskable).round().long().minimum(num_maskable - 1)

    def _first_rows(self, clean: CleanBatch, example: Int[Tensor, "b"], order: Int[Tensor, "b N"]) -> PoolRows:
        """Stages are spread evenly over K (also where there are more than blocks)."""
        return self._new_rows(clean, example, order * self.num_stages // (self.shard.total * order.shape[1]))

    def _fresh_rows(self, clean: CleanBatch, example: Int[Tensor, "b"]) -> PoolRows:
        return self._new_rows(clean, example, example.new_zeros(len(example), self._num_blocks(clean)))

    def _new_rows(self, clean: CleanBatch, example: Int[Tensor, "b"], stage: Int[Tensor, "b N"]) -> PoolRows:
        num_blocks = stage.shape[1]
        num_maskable = in_blocks(~clean.prompt_mask, num_blocks).sum(dim=-1)
        num_revealed = self._draw_num_revealed(num_maskable, stage, Purpose.REFILL, blocks_of(example, num_blocks))
        return new_rows(clean, example, stage, num_revealed, self.seed)

    def _as_batch(self, pool: PoolRows) -> MaskedBatch:
        weight = weights.per_masked(pool.masked, pool.eligible)
        return score_masked(pool.x0, pool.xt(self.mask_id), self.mask_id, weight)

    def _change_num_stages(self, num_stages: int) -> None:
        """Rows keep their masks; a block gets the stage, of the new K, that its revealed fraction stands for."""
        self.num_stages = num_stages
        if self.pool is not None:
            self.pool.stage = self._stage_of(self.pool).clamp(max=num_stages - 1)

    def _stage_of(self, pool: PoolRows) -> Int[Tensor, "b N"]:
        """`floor(K F)`, F being the mass below a block's revealed share; under uniform times that share itself."""
        mass = self.revealed_share.cdf(pool.num_revealed / pool.num_maskable.clamp(min=1).double())
        return (self.num_stages * mass + 1e-9).floor().long()  # whole where K revealed / L_b is

    def metrics(self) -> dict[str, float]:
        return {"puma/num_stages": float(self.num_stages), **super().metrics()}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "num_stages": self.num_stages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.num_stages = state["num_stages"]
