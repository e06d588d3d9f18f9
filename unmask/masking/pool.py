"""A pool of rows that is trained on and then unmasked a little further, by the model's own confidences.

Row r (of the global batch) holds, one after the other, the examples `stream[r + j B]`; its noise is keyed by the
example and by the number of steps that the example has been visited. Pools are therefore the same however many
processes share the batch.

All is done on `device`, in shapes that do not depend on what the model says, and nothing waits for the device but the
count of scored positions, once a step (`process.score`).

Dimensions: B rows of the global batch, b rows of this process, L positions.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unmask import noise
from unmask.data.stream import ExampleStream
from unmask.masking.process import Requirements, RowShard
from unmask.masking.random import mask_exactly
from unmask.masking.upcoming import Upcoming
from unmask.noise import Purpose
from unmask.reveal import ORDERS, above, surest
from unmask.types import CleanBatch, MaskedBatch, TokenStats


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

    def xt(self, mask_id: int) -> Int[Tensor, "b L"]:
        return torch.where(self.is_masked, mask_id, self.x0)

    def replaced_where_done(self, fresh: "PoolRows") -> "PoolRows":
        row, position = self.is_done, self.is_done.unsqueeze(1)
        return PoolRows(
            **{
                name: torch.where(row if value.ndim == 1 else position, getattr(fresh, name), value)
                for name, value in vars(self).items()
            }
        )


class Pool(ABC):
    """What the constructions of progressive unmasking have in common: rows, reveals, refills and state.

    A construction says how new rows are masked, what of a row is scored, how many positions it reveals next, and when
    it is done.

    Args:
        threshold: with it, positions whose top-1 probability exceeds it are revealed at once, whatever the count.
        confidence: what orders the reveals: a key of `reveal.ORDERS`.
    """

    def __init__(
        self,
        *,
        mask_id: int,
        shard: RowShard,
        threshold: float | None,
        confidence: str,
        seed: int,
        device: torch.device | None,
    ) -> None:
        self.mask_id = mask_id
        self.shard = shard
        self.threshold = threshold
        self.order = ORDERS[confidence]
        self.requirements = Requirements(confidence=self.order.confidence)
        self.seed = seed
        self.device = device or torch.device("cpu")
        self.step = 0
        self._num_refills = torch.zeros((), dtype=torch.long, device=self.device)
        self._num_revealed = torch.zeros((), dtype=torch.long, device=self.device)
        self._upcoming: Upcoming | None = None
        self.pool: PoolRows | None = None

    @abstractmethod
    def _first_rows(self, clean: CleanBatch, example: Int[Tensor, "b"], order: Int[Tensor, "b"]) -> PoolRows:
        """The rows that a pool starts with; `order` is a permutation of the global batch, to spread them by."""

    @abstractmethod
    def _fresh_rows(self, clean: CleanBatch, example: Int[Tensor, "b"]) -> PoolRows:
        """Rows that take the place of those that are done."""

    @abstractmethod
    def _as_batch(self, pool: PoolRows) -> MaskedBatch: ...

    @abstractmethod
    def _count(self, pool: PoolRows) -> Int[Tensor, "b"]:
        """How many positions each row reveals after this step, the surest first."""

    @abstractmethod
    def _advance(self, pool: PoolRows) -> Bool[Tensor, "b"]:
        """Moves `pool.stage` on, after the reveals; returns which rows are done."""

    @property
    def num_refills(self) -> int:
        """Examples that have entered the pool. Waits for the device."""
        return int(self._num_refills)

    @property
    def examples_seen(self) -> int:
        return self.num_refills

    def next_batch(self, stream: ExampleStream) -> MaskedBatch:
        self.pool = self._first_pool(stream) if self.pool is None else self._refilled(self.pool, stream)
        return self._as_batch(self.pool)

    @torch.no_grad()
    def observe(self, batch: MaskedBatch, stats: TokenStats) -> None:
        pool = self.pool
        assert pool is not None, "observe follows next_batch"
        is_revealed = self._choose(pool, batch, stats)
        self._num_revealed = is_revealed.sum()
        # New tensors, not changes in place: batches and saved states hold on to the old ones.
        pool.is_masked = pool.is_masked & ~is_revealed
        pool.is_done = self._advance(pool)
        pool.visit = pool.visit + 1
        self.step += 1

    def _choose(self, pool: PoolRows, batch: MaskedBatch, stats: TokenStats) -> Bool[Tensor, "b L"]:
        """What each row reveals. (A row that is done is refilled, whatever it reveals.)"""
        position = torch.arange(pool.x0.shape[1], device=self.device)
        score = self.order.score(
            batch.scatter(stats.confidence, -torch.inf),
            lambda: noise.uniform(
                self.seed, Purpose.ORDER, pool.example.unsqueeze(1), pool.visit.unsqueeze(1), position
            ),
        )
        is_revealed = surest(score, pool.is_masked, self._count(pool))
        if self.threshold is not None:
            is_revealed |= above(batch.scatter(stats.top1, 0.0), pool.is_masked, self.threshold)
        return is_revealed

    def _first_pool(self, stream: ExampleStream) -> PoolRows:
        rows = self.shard.index(self.device)
        order = noise.permute(rows, self.shard.total, self.seed, Purpose.STAGE)
        self._num_refills = torch.full_like(self._num_refills, len(rows))
        return self._first_rows(stream[rows.cpu()].to(self.device), rows, order)

    def _refilled(self, pool: PoolRows, stream: ExampleStream) -> PoolRows:
        """The pool with new examples where a row is done."""
        number = pool.example + self.shard.total
        if self._upcoming is None:
            self._upcoming = Upcoming(stream, number.cpu(), stride=self.shard.total, device=self.device)
        else:
            self._upcoming.restock(stream)
        fresh = self._fresh_rows(self._upcoming.clean, number)
        self._upcoming.take(pool.is_done)
        self._num_refills = self._num_refills + pool.is_done.sum()
        return pool.replaced_where_done(fresh)

    def metrics(self) -> dict[str, float]:
        """Waits for the device. Steps that a row lives: 1 / `puma/finished_share`, on average over some lines."""
        if self.pool is None:
            return {}
        return {
            "puma/steps_per_example": self._steps_per_example(),
            "puma/finished_share": self.pool.is_done.double().mean().item(),
            "puma/revealed_per_row": self._num_revealed.item() / self.shard.size,
        }

    def _steps_per_example(self) -> float:
        """Steps that an example has been trained on so far, on average over all that entered the pool."""
        return self.step * self.shard.size / max(1, self.num_refills)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "num_refills": self.num_refills,
            "pool": None if self.pool is None else dict(vars(self.pool)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self._num_refills = torch.full_like(self._num_refills, state["num_refills"])
        self._upcoming = None  # a function of the pool's examples
        self.pool = (
            None
            if state["pool"] is None
            else PoolRows(**{name: t.to(self.device) for name, t in state["pool"].items()})
        )


def new_rows(
    clean: CleanBatch,
    example: Int[Tensor, "b"],
    stage: Int[Tensor, "b"],
    num_revealed: Int[Tensor, "b"],
    seed: int,
) -> PoolRows:
    """Examples that enter a pool, positions revealed at random: the model has not seen them yet."""
    eligible = ~clean.prompt_mask
    return PoolRows(
        example=example,
        visit=torch.zeros_like(example),
        stage=stage,
        is_done=torch.zeros_like(example, dtype=torch.bool),
        x0=clean.x0,
        prompt_mask=clean.prompt_mask,
        is_masked=mask_exactly(eligible, eligible.sum(dim=-1) - num_revealed, example, seed, Purpose.MASK),
    )
