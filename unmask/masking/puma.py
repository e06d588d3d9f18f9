"""PUMA, Progressive UnMAsking (2602.10314): training on the masks that decoding meets.

A pool of rows is kept, each at its own stage. Every step trains on the pool as it stands; then each row is unmasked a
little further, in the order of the model's own confidences from that same forward pass, with its true tokens. A row
that is done is refilled with a new example, so there is no second forward pass and no idle row.

Nothing here looks at how well a hidden token is predicted, and no count depends on hidden content: given what is
visible, the hidden tokens keep their distribution under the data, so the minimiser of the loss is still the true
conditional.

Dimensions: B rows of the global batch, b rows of this process, L positions, K stages.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Int
from pydantic import AfterValidator, Field
from torch import Tensor

from unmask import noise
from unmask.config import OrderName, Section
from unmask.data.stream import ExampleStream
from unmask.masking import weights
from unmask.masking.process import ProcessContext, Requirements, RowShard, score_masked
from unmask.masking.random import mask_exactly
from unmask.masking.upcoming import Upcoming
from unmask.noise import Purpose
from unmask.reveal import ORDERS, above, surest
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


@dataclass(kw_only=True)
class PoolRows:
    """The state of this process's rows. Row r of the global batch holds the examples r, r + B, r + 2 B, … in turn."""

    example: Int[Tensor, "b"]
    visit: Int[Tensor, "b"]
    """Steps that the row's example has been trained on."""
    stage: Int[Tensor, "b"]
    is_done: Bool[Tensor, "b"]
    """Where the row takes its next example before the next step."""
    x0: Int[Tensor, "b L"]
    prompt_mask: Bool[Tensor, "b L"]
    is_masked: Bool[Tensor, "b L"]

    @property
    def num_maskable(self) -> Int[Tensor, "b"]:
        """L_eff. Padding counts: the answer's own length is hidden."""
        return (~self.prompt_mask).sum(dim=-1)

    @property
    def num_revealed(self) -> Int[Tensor, "b"]:
        return self.num_maskable - self.is_masked.sum(dim=-1)

    def as_batch(self, mask_id: int) -> MaskedBatch:
        xt = torch.where(self.is_masked, mask_id, self.x0)
        return score_masked(self.x0, xt, mask_id, weights.per_masked(self.is_masked))

    def replaced_where_done(self, fresh: "PoolRows") -> "PoolRows":
        row, position = self.is_done, self.is_done.unsqueeze(1)
        return PoolRows(
            **{
                name: torch.where(row if value.ndim == 1 else position, getattr(fresh, name), value)
                for name, value in vars(self).items()
            }
        )


class PumaPool:
    """The masking process: a pool that follows the model.

    Row r (of the global batch) holds, one after the other, the examples `stream[r + j B]`; its noise is keyed by the
    example and by the number of steps that the example has been visited. Pools are therefore the same however many
    processes share the batch.

    All is done on `device`, in shapes that do not depend on what the model says, and nothing waits for the device but
    the count of masked positions, once a step (`score_masked`).

    Args:
        num_stages: K. A row passes through about K masks, from all masked to almost none.
        stage_schedule: [[step, K], ...]: from that step on, K changes. Rows keep their masks and are re-bucketed.
        threshold: with it, positions whose top-1 probability exceeds it are revealed at once, whatever the stage.
        confidence: what orders the reveals: `prob`, `margin`, `neg_entropy` or `random`.
    """

    class Config(Section):
        name: str = "puma"
        num_stages: int = Field(8, ge=1, description="K: masks that a row passes through")
        stage_schedule: StageSchedule = Field(
            [], description="[[step, K], ...]: from each step on, K changes; steps increase"
        )
        threshold: float | None = Field(
            None, gt=0, le=1, description="reveal at once what the model gives more than this probability"
        )
        confidence: OrderName = Field("prob", description="what orders the reveals")

    def __init__(
        self,
        *,
        mask_id: int,
        shard: RowShard,
        num_stages: int = 8,
        stage_schedule: list[tuple[int, int]] | None = None,
        threshold: float | None = None,
        confidence: str = "prob",
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.mask_id = mask_id
        self.shard = shard
        self.num_stages = num_stages
        self.stage_schedule = dict(stage_schedule or [])
        self.threshold = threshold
        self.order = ORDERS[confidence]
        self.requirements = Requirements(confidence=self.order.confidence)
        self.seed = seed
        self.device = device or torch.device("cpu")
        self.step = 0
        self._num_refills = torch.zeros((), dtype=torch.long, device=self.device)
        self._upcoming: Upcoming | None = None
        self.pool: PoolRows | None = None

    @classmethod
    def from_config(cls, config: Config, context: ProcessContext) -> "PumaPool":
        return cls(
            mask_id=context.tokens.mask_id,
            shard=context.shard,
            seed=context.seed,
            device=context.device,
            num_stages=config.num_stages,
            stage_schedule=config.stage_schedule,
            threshold=config.threshold,
            confidence=config.confidence,
        )

    @property
    def num_refills(self) -> int:
        """Examples that have entered the pool. Waits for the device."""
        return int(self._num_refills)

    @property
    def examples_seen(self) -> int:
        return self.num_refills

    def next_batch(self, stream: ExampleStream) -> MaskedBatch:
        self.pool = self._first_pool(stream) if self.pool is None else self._refilled(self.pool, stream)
        return self.pool.as_batch(self.mask_id)

    @torch.no_grad()
    def observe(self, batch: MaskedBatch, stats: TokenStats) -> None:
        pool = self.pool
        assert pool is not None, "observe follows next_batch"
        stage = pool.stage + 1
        # New tensors, not changes in place: batches and saved states hold on to the old ones.
        pool.is_masked = pool.is_masked & ~self._choose(pool, stage, batch, stats)
        if self.threshold is not None:
            # A row that jumped ahead skips stages; never back, or a row with L_eff < K would not leave its stage.
            stage = stage.maximum(_stage_of(pool.num_revealed, pool.num_maskable, self.num_stages))
        pool.stage = stage
        pool.visit = pool.visit + 1
        pool.is_done = (stage >= self.num_stages) | ~pool.is_masked.any(dim=-1)
        self.step += 1
        if self.step in self.stage_schedule:
            self._change_num_stages(self.stage_schedule[self.step])

    def _choose(
        self, pool: PoolRows, stage: Int[Tensor, "b"], batch: MaskedBatch, stats: TokenStats
    ) -> Bool[Tensor, "b L"]:
        """What each row reveals on its way into `stage`. (A row that is done is refilled, whatever it reveals.)"""
        num_revealed = pool.num_revealed
        target = self._draw_num_revealed(pool.num_maskable, stage, Purpose.TARGET, pool.example, pool.visit)
        target = target.maximum(num_revealed + 1)
        position = torch.arange(pool.x0.shape[1], device=self.device)
        score = self.order.score(
            batch.scatter(stats.confidence, -torch.inf),
            lambda: noise.uniform(
                self.seed, Purpose.ORDER, pool.example.unsqueeze(1), pool.visit.unsqueeze(1), position
            ),
        )
        is_revealed = surest(score, pool.is_masked, target - num_revealed)
        if self.threshold is not None:
            is_revealed |= above(batch.scatter(stats.top1, 0.0), pool.is_masked, self.threshold)
        return is_revealed

    def _draw_num_revealed(
        self, num_maskable: Int[Tensor, "b"], stage: Int[Tensor, "b"], purpose: Purpose, *keys: Int[Tensor, "b"]
    ) -> Int[Tensor, "b"]:
        """`round(r L_eff)`, at most L_eff - 1, with r ~ U[stage / K, (stage + 1) / K)."""
        r = (stage + noise.uniform(self.seed, purpose, *keys)) / self.num_stages
        return (r * num_maskable).round().long().minimum(num_maskable - 1)

    def _first_pool(self, stream: ExampleStream) -> PoolRows:
        """All rows new, their stages spread evenly over K (also where K > B)."""
        rows = self.shard.index(self.device)
        order = noise.permute(rows, self.shard.total, self.seed, Purpose.STAGE)
        self._num_refills = torch.full_like(self._num_refills, len(rows))
        clean = stream[rows.cpu()].to(self.device)
        return self._new_rows(clean, rows, order * self.num_stages // self.shard.total)

    def _refilled(self, pool: PoolRows, stream: ExampleStream) -> PoolRows:
        """The pool with new examples where a row is done."""
        number = pool.example + self.shard.total
        if self._upcoming is None:
            self._upcoming = Upcoming(stream, number.cpu(), stride=self.shard.total, device=self.device)
        else:
            self._upcoming.restock(stream)
        fresh = self._new_rows(self._upcoming.clean, number, torch.zeros_like(number))
        self._upcoming.take(pool.is_done)
        self._num_refills = self._num_refills + pool.is_done.sum()
        return pool.replaced_where_done(fresh)

    def _new_rows(self, clean: CleanBatch, example: Int[Tensor, "b"], stage: Int[Tensor, "b"]) -> PoolRows:
        """Examples that enter the pool at `stage`, positions revealed at random: the model has not seen them yet."""
        eligible = ~clean.prompt_mask
        num_maskable = eligible.sum(dim=-1)
        num_revealed = self._draw_num_revealed(num_maskable, stage, Purpose.REFILL, example)
        return PoolRows(
            example=example,
            visit=torch.zeros_like(example),
            stage=stage,
            is_done=torch.zeros_like(example, dtype=torch.bool),
            x0=clean.x0,
            prompt_mask=clean.prompt_mask,
            is_masked=mask_exactly(eligible, num_maskable - num_revealed, example, self.seed, Purpose.MASK),
        )

    def _change_num_stages(self, num_stages: int) -> None:
        """Rows keep their masks; each gets the stage, of the new K, that its revealed fraction stands for."""
        self.num_stages = num_stages
        if self.pool is not None:
            stage = _stage_of(self.pool.num_revealed, self.pool.num_maskable, num_stages)
            self.pool.stage = stage.clamp(max=num_stages - 1)

    def metrics(self) -> dict[str, float]:
        return {"puma/num_stages": float(self.num_stages), "puma/steps_per_example": self._steps_per_example()}

    def _steps_per_example(self) -> float:
        """Steps that an example has been trained on so far, on average over all that entered the pool."""
        return self.step * self.shard.size / max(1, self.num_refills)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "num_refills": self.num_refills,
            "num_stages": self.num_stages,
            "pool": None if self.pool is None else dict(vars(self.pool)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self._num_refills = torch.full_like(self._num_refills, state["num_refills"])
        self._upcoming = None  # a function of the pool's examples
        self.num_stages = state["num_stages"]
        self.pool = (
            None
            if state["pool"] is None
            else PoolRows(**{name: t.to(self.device) for name, t in state["pool"].items()})
        )


def _stage_of(num_revealed: Int[Tensor, "b"], num_maskable: Int[Tensor, "b"], num_stages: int) -> Int[Tensor, "b"]:
    """`floor(K revealed / L_eff)`."""
    return num_stages * num_revealed // num_maskable.clamp(min=1)
