"""PUMA, Progressive UnMAsking (2602.10314): training on the masks that decoding meets.

A pool of rows is kept, each at its own stage. Every step trains on the pool as it stands; then each row is unmasked a
little further, in the order of the model's own confidences from that same forward pass, with its true tokens. A row
that is done is refilled with a new example, so there is no second forward pass and no idle row.

Nothing here looks at how well a hidden token is predicted, and no count depends on hidden content: given what is
visible, the hidden tokens keep their distribution under the data, so the minimiser of the loss is still the true
conditional.

In blocks (2503.09573), every block of a row has a stage of its own, and all of the above holds for a block;
a row is done when all its blocks are.

Dimensions: B rows of the global batch, b rows of this process, N blocks of a row (1 in plain diffusion), S positions of
a block, L_b maskable ones, K stages.
"""

from itertools import pairwise
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Int
from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny, field_validator
from torch import Tensor

from unmask import noise
from unmask.blocks import blocks_of, in_blocks, over_positions
from unmask.data.stream import ExampleStream
from unmask.errors import UserError
from unmask.masking import time, weights
from unmask.masking.pool import Pool, PoolConfig
from unmask.masking.pool_rows import PoolRows, new_rows
from unmask.masking.process import check_count
from unmask.masking.time import DensityConfig, TimeConfig, Uniform, masked_count, stratified
from unmask.masking.uniform import TIME
from unmask.noise import Purpose
from unmask.reveal import most_confident
from unmask.types import CleanBatch, MaskedBatch, TokenSpec, TokenStats, to_device


def _check_schedule(schedule: list[tuple[int, int]]) -> list[tuple[int, int]]:
    for (earlier, _), (later, _) in pairwise(schedule):
        if later <= earlier:
            raise ValueError(
                f"steps must increase, but {later} follows {earlier}; write [[step, K], ...] in order of step"
            )
    return schedule


StageSchedule = Annotated[
    list[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1, le=1_000_000)]]],
    BeforeValidator(lambda value: [] if value is None else value),
    AfterValidator(_check_schedule),
]


class PumaPool(Pool):
    """The masking process: a pool that follows the model, stage by stage.

    A row passes through about K masks, from all masked to almost none. At stage s of K, `round(r L_b)` of its L_b
    maskable positions are visible, with r ~ U[s / K, (s + 1) / K) under uniform times. Settings and arguments are those
    of `PumaPool.Config` and `Pool`.

    Short runs lie between uniform masks and PUMA: a new row begins on a random mask of a share drawn from `start`, and
    leaves after `run` steps. With `start` uniform and a run of 1 every batch is that of `RandomMasking`.
    """

    class Config(PoolConfig):
        """The settings of a section `process` named `puma`."""

        aliases: ClassVar[dict[str, str]] = {"K": "num_stages"}

        name: str = "puma"
        num_stages: int = Field(8, ge=1, le=1_000_000, description="K: masks that a row passes through")
        stage_schedule: StageSchedule = Field(
            [], description="[[step, K], ...]: from each step on, K changes; steps increase"
        )
        time: TimeConfig = Field(Uniform(), description=f"{TIME}: stages are of equal mass")

        start: SerializeAsAny[DensityConfig] | None = Field(
            None, description="density of a new row's masked share: a name, or settings with a name; null = all masked"
        )
        run: int | None = Field(
            None,
            ge=1,
            description="steps that a row stays at most; null = until it is done",
        )

        @field_validator("start", mode="before")
        @classmethod
        def _read_start(cls, value: Any) -> Any:
            return None if value is None else time.read(value, "process.start")

    config: Config

    def __init__(self, config: Config | None = None, **arguments: Any) -> None:
        super().__init__(config, **arguments)
        self.num_stages = self.config.num_stages
        self.revealed_share = self.config.time.build().mirrored.to(self.device)
        """Density of the visible fraction r = 1 - t; the K stages have equal mass under it."""
        start = self.config.start
        self.start = None if start is None else start.build()
        self.max_visits: int | None = self.config.run

    def comes_back(self, rows: PoolRows) -> bool:
        """True unless a run, or K, is one step."""
        return self.max_visits != 1 and self.num_stages > 1

    def next_batch(self, stream: ExampleStream) -> MaskedBatch:
        """Returns the pool as it stands, with examples of `stream` in place of rows that are done.

        The loss is `sum(weight * nll) / B`. Called again before `observe`, it gives the same batch.
        """
        rows = self.renewed_rows(stream)
        weight = weights.per_masked(rows.masked, rows.eligible)
        return self.batch_of(over_positions(weight, rows.x0.shape[1]))

    @torch.no_grad()
    def observe(self, batch: MaskedBatch, stats: TokenStats) -> None:
        """Unmasks every block of the pool one stage further; `stats` are the model's on `batch`, before its update."""
        rows = self.rows
        assert rows is not None, "observe follows next_batch"
        masked, length, revealed = rows.masked, rows.num_maskable, rows.num_revealed  # (b, N, S), (b, N), (b, N)
        score = self.scores(rows, batch, stats)
        # 1. Every block moves on one stage, and draws how much of it that stage shows: at least one position more.
        stage = rows.stage + 1
        target = self._draw_num_revealed(length, stage, Purpose.TARGET, rows.example.unsqueeze(1), rows.block_visit)
        target = target.maximum(revealed + 1)
        # 2. Its most confident positions are revealed up to there, with their true tokens.
        reveal = most_confident(score, masked, target - revealed)
        # 3. So is whatever the model is sure of. A block that jumps ahead skips stages, and never goes back: one with
        #    L_b < K would not leave its stage.
        if self.rule is not None:
            reveal = reveal | self.rule(self.reveal_state(rows, batch, stats, score))
            stage = stage.maximum(self._stage_of(revealed + reveal.sum(dim=-1), length))
        # 4. At stage K a block is done: all of it is shown. A row is refilled when all its blocks are, or its run ends.
        is_done = stage >= self.num_stages
        if self.max_visits is not None:
            is_done = is_done | (rows.visit + 1 >= self.max_visits).unsqueeze(1)
        self.advance(rows, stats, reveal=reveal, stage=stage.clamp(max=self.num_stages), is_done=is_done)
        # 5. Where K changes, blocks keep their masks and take the stage of the new K that their share stands for.
        self._change_num_stages(rows)
        # 6. New examples are made ready in place of rows that are done.
        self.renew_ahead()

    def _draw_num_revealed(
        self, num_maskable: Int[Tensor, "b N"], stage: Int[Tensor, "b N"], purpose: Purpose, *keys: Int[Tensor, "b ..."]
    ) -> Int[Tensor, "b N"]:
        """Draws `round(r L_b)`, at most L_b - 1; below r lies the mass u ~ U[stage / K, (stage + 1) / K).

        Under uniform times r = u.
        """
        r = self.revealed_share.icdf((stage + noise.uniform(self.seed, purpose, *keys)) / self.num_stages)
        return (r * num_maskable).round().long().minimum(num_maskable - 1)

    def _stage_of(self, num_revealed: Int[Tensor, "b N"], num_maskable: Int[Tensor, "b N"]) -> Int[Tensor, "b N"]:
        """Returns `floor(K F)`, F being the mass below a block's revealed share; under uniform times that share."""
        mass = self.revealed_share.cdf(num_revealed / noise.wide(num_maskable.clamp(min=1)))
        return (self.num_stages * mass + 1e-9).floor().long()  # whole where K revealed / L_b is

    def first_rows(self, clean: CleanBatch, example: Int[Tensor, "b"], place: Int[Tensor, "b N"]) -> PoolRows:
        """Makes the rows of a new pool, spread evenly over the stages, or steps of a run, that rows pass through."""
        num_blocks = place.shape[1]
        stage, visit = place * self.num_stages // (self.shard.total * num_blocks), None
        if self.max_visits is not None and self.max_visits < self.num_stages:  # else all rows would leave at once
            place_of_row = noise.permute(self.shard.index(self.device), self.shard.total, self.seed, Purpose.STAGE)
            visit = place_of_row * self.max_visits // self.shard.total
            stage = visit.unsqueeze(1).expand_as(place)
        if self.start is None:
            rows = self._new_rows(clean, example, stage)
        else:
            rows = self.fresh_rows(clean, example, num_blocks)
        if visit is not None:
            rows.visit = visit
        return rows

    def fresh_rows(self, clean: CleanBatch, example: Int[Tensor, "b"], num_blocks: int) -> PoolRows:
        """Makes rows of new examples: all masked but for stage 0's share, or on masks of a share drawn from `start`."""
        if self.start is None:
            stage = torch.zeros(len(example), num_blocks, dtype=torch.long, device=self.device)
            return self._new_rows(clean, example, stage)
        # The noise of `RandomMasking`, keyed by the row's turn in place of the step; drawn on the CPU, as there.
        row, turn = self.shard.index(example.device), (example // self.shard.total).unsqueeze(1)
        t = to_device(stratified(self.start, row, self.shard.total, self.seed, turn, num_blocks), self.device)
        num_maskable = in_blocks(~clean.prompt_mask, num_blocks).sum(dim=-1)
        num_revealed = num_maskable - masked_count(t, num_maskable)
        stage = self._stage_of(num_revealed, num_maskable).clamp(max=self.num_stages - 1)
        return new_rows(clean, example, stage, num_revealed, self.seed)

    def _new_rows(self, clean: CleanBatch, example: Int[Tensor, "b"], stage: Int[Tensor, "b N"]) -> PoolRows:
        """Makes rows at these stages, positions revealed at random."""
        num_blocks = stage.shape[1]
        num_maskable = in_blocks(~clean.prompt_mask, num_blocks).sum(dim=-1)
        example = to_device(example, self.device)
        num_revealed = self._draw_num_revealed(num_maskable, stage, Purpose.REFILL, blocks_of(example, num_blocks))
        return new_rows(clean, example, stage, num_revealed, self.seed)

    def _change_num_stages(self, rows: PoolRows) -> None:
        """Changes K where the schedule does so at this step."""
        changes = dict(self.config.stage_schedule)
        if self.step in changes:
            self.num_stages = changes[self.step]
            stage = self._stage_of(rows.num_revealed, rows.num_maskable)
            rows.stage = stage.clamp(max=self.num_stages - 1)

    def about_unused(self) -> str | None:
        """Says that `run` has no effect, where rows are done before it ends; None if it has one.

        With `stage_schedule` a row may pass through more stages than any K: then nothing is said.
        """
        run = self.config.run
        if run is None or self.config.stage_schedule or run < self.config.num_stages:
            return None
        return (
            f"without effect: process.run={run} (a row is done after process.num_stages={self.config.num_stages} "
            "steps at most)"
        )

    def metrics(self) -> dict[str, float]:
        """Returns `Pool.metrics` and K."""
        return {"puma/num_stages": float(self.num_stages), **super().metrics()}

    def state_dict(self) -> dict[str, Any]:
        """Returns `Pool.state_dict` and K."""
        return {**super().state_dict(), "num_stages": self.num_stages}

    def check_state(self, state: dict[str, Any], tokens: TokenSpec) -> None:
        """Checks a saved state: `Pool.check_state`, K and the stages.

        Raises:
            UserError: it is damaged, or of another pool; names the field.
        """
        super().check_state(state, tokens)
        check_count(state, "num_stages")
        valid = {self.config.num_stages, *(k for _, k in self.config.stage_schedule)}
        if state["num_stages"] not in valid:
            raise UserError(f"num_stages={state['num_stages']}: process.num_stages and stage_schedule have {valid}")
        if state["pool"] is not None and int(state["pool"]["stage"].max()) > state["num_stages"]:
            raise UserError(f"pool.stage: goes beyond num_stages={state['num_stages']}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`, bit for bit."""
        super().load_state_dict(state)
        self.num_stages = state["num_stages"]
