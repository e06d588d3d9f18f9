"""A pool of rows that is trained on and then unmasked a little further, by the model's own confidences.

Row r (of the global batch) holds, one after the other, the examples `stream[r + j B]`; its noise is keyed by the
example and by the number of steps that the example has been visited. Pools are therefore the same however many
processes share the batch.

In blocks, each block of a row is at a stage of its own. One that is done is visible as a whole, so out of the loss; the
row is done when all its blocks are.

All is done on `device`, in shapes that do not depend on what the model says, and nothing waits for the device but the
count of scored positions, once a step (`process.score`).

Dimensions: B rows of the global batch, b rows of this process, N blocks of a row (1 in plain diffusion), S positions of
a block, L of a row.

The rows of a pool: which examples, how far each block has come, what is masked.

Dimensions: B rows of the global batch, b rows of this process, N blocks of a row (1 in plain diffusion), S positions of
a block, L of a row.

The examples that a pool's rows take next, ready on the device.

Dimensions: b rows of this process, n of them, L positions.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import Field, model_validator
from torch import Tensor

from unmask import noise
from unmask.blocks import blocks_of, count_blocks, in_blocks, over_positions
from unmask.config.settings import OrderName, Section
from unmask.data.stream import ExampleStream, examples_of
from unmask.errors import UserError, choose
from unmask.masking.process import Requirements, RowShard
from unmask.masking.uniform import BLOCK_SIZE, mask_exactly
from unmask.noise import Purpose
from unmask.reveal import ORDERS, PARALLEL_RULES, RevealRule, RevealState, most_confident
from unmask.types import CleanBatch, MaskedBatch, TokenStats, to_device


@dataclass(kw_only=True)
class PoolRows:
    """The state of this process's rows. Row r of the global batch holds the examples r, r + B, r + 2 B, … in turn."""

    example: Int[Tensor, "b"]
    visit: Int[Tensor, "b"]
    """Steps that the row's example has been trained on."""
    stage: Int[Tensor, "b N"]
    x0: Int[Tensor, "b L"]
    prompt_mask: Bool[Tensor, "b L"]
    is_masked: Bool[Tensor, "b L"]

    @property
    def is_done(self) -> Bool[Tensor, "b"]:
        """Where the row takes its next example before the next step: no block has anything left to learn from."""
        return ~self.is_masked.any(dim=-1)

    @property
    def num_blocks(self) -> int:
        return self.stage.shape[1]

    def in_blocks(self, values: Shaped[Tensor, "b L"]) -> Shaped[Tensor, "b N S"]:
        return in_blocks(values, self.num_blocks)

    @property
    def masked(self) -> Bool[Tensor, "b N S"]:
        """`is_masked`, in blocks."""
        return self.in_blocks(self.is_masked)

    @property
    def eligible(self) -> Bool[Tensor, "b N S"]:
        """What may be masked, in blocks."""
        return self.in_blocks(~self.prompt_mask)

    @property
    def num_maskable(self) -> Int[Tensor, "b N"]:
        """L_b of each block. Padding counts: the answer's own length is hidden."""
        return self.eligible.sum(dim=-1)

    @property
    def num_revealed(self) -> Int[Tensor, "b N"]:
        return self.num_maskable - self.masked.sum(dim=-1)

    @property
    def block_visit(self) -> Int[Tensor, "b N"]:
        """`visit N + n`: what keys the draws of block n, beside the example."""
        return blocks_of(self.visit, self.num_blocks)

    def xt(self, mask_id: int) -> Int[Tensor, "b L"]:
        return torch.where(self.is_masked, mask_id, self.x0)

    def reveal(self, is_revealed: Bool[Tensor, "b L"]) -> None:
        """New tensors, not changes in place: batches and saved states hold on to the old ones."""
        self.is_masked = self.is_masked & ~is_revealed

    def finish(self, is_done: Bool[Tensor, "b N"]) -> None:
        """Shows the whole of these blocks."""
        self.reveal(over_positions(is_done, self.x0.shape[1]))

    def replaced_where_done(self, fresh: "PoolRows") -> "PoolRows":
        row = self.is_done
        return PoolRows(
            **{
                name: torch.where(row if value.ndim == 1 else row.unsqueeze(1), getattr(fresh, name), value)
                for name, value in vars(self).items()
            }
        )


def new_rows(
    clean: CleanBatch,
    example: Int[Tensor, "b"],
    stage: Int[Tensor, "b N"],
    num_revealed: Int[Tensor, "b N"],
    seed: int,
) -> PoolRows:
    """Examples that enter a pool, positions revealed at random: the model has not seen them yet."""
    eligible = in_blocks(~clean.prompt_mask, stage.shape[1])
    is_masked = mask_exactly(eligible, eligible.sum(dim=-1) - num_revealed, example, seed, Purpose.MASK)
    return PoolRows(
        example=example,
        visit=torch.zeros_like(example),
        stage=stage,
        x0=clean.x0,
        prompt_mask=clean.prompt_mask,
        is_masked=is_masked.flatten(1),
    )


class Prefetcher:
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
        self._taken: _AsyncCopy | None = None
        self.clean = examples_of(stream, number).to(device)

    def take(self, is_taken: Bool[Tensor, "b"]) -> None:
        """These rows have taken theirs."""
        self._taken = _AsyncCopy(is_taken)

    def restock(self, stream: ExampleStream) -> None:
        """Puts the next one where a row took its own, before any can be taken again."""
        if self._taken is None:
            return
        rows = self._taken.wait().nonzero().squeeze(1)
        self._taken = None
        if len(rows):
            self._number = self._number.index_add(0, rows, torch.full_like(rows, self._stride))
            fresh, place = examples_of(stream, self._number[rows]).to(self._device), to_device(rows, self._device)
            self.clean = CleanBatch(
                x0=self.clean.x0.index_copy(0, place, fresh.x0),
                prompt_mask=self.clean.prompt_mask.index_copy(0, place, fresh.prompt_mask),
            )


class _AsyncCopy:
    """A tensor on its way to the CPU, which waits only for what was asked of the device before it set out."""

    def __init__(self, value: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._value = value
        if value.device.type == "cuda":
            self._value = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._value


_ENTROPY = "neg_entropy"


class PoolConfig(Section):
    """The settings that all pools have."""

    alternatives = tuple(PARALLEL_RULES)

    name: str
    threshold: float | None = Field(
        None, gt=0, le=1, description="reveal at once what the model gives more than this probability"
    )
    factor: float | None = Field(
        None,
        gt=0,
        description="in place of threshold: reveal the n surest with (n + 1)(1 - least probability) < factor",
    )
    entropy_bound: float | None = Field(
        None, ge=0, description="in place of threshold: reveal the surest whose joint entropy this bounds, in nats"
    )
    confidence: OrderName = Field("prob", description="what orders the reveals")
    block_size: int | None = Field(None, ge=1, description=BLOCK_SIZE)

    @model_validator(mode="before")
    @classmethod
    def _replace_default(cls, given: Any) -> Any:
        """An alternative that is given takes the place of one that is on by default."""
        if isinstance(given, dict) and any(given.get(key) is not None for key in cls.alternatives):
            return {**dict.fromkeys(cls.alternatives), **given}
        return given

    @model_validator(mode="after")
    def _check_rule(self) -> "PoolConfig":
        parallel_rule(self.confidence, **{key: getattr(self, key) for key in PARALLEL_RULES})
        return self


def parallel_rule(confidence: str, **given: float | None) -> RevealRule | None:
    """What a pool that orders by `confidence` reveals beyond its count: the rule given, by its key in `PARALLEL_RULES`.

    Raises:
        UserError: several are given, or one needs an entropy that the pool is not told.
    """
    asked = {key: value for key, value in given.items() if value is not None}
    if len(asked) > 1:
        raise UserError(f"{' and '.join(f'process.{key}={value}' for key, value in asked.items())}: give one of them")
    for key, value in asked.items():
        rule = PARALLEL_RULES[key](value)
        if getattr(rule, "needs_entropy", False) and choose(ORDERS, "confidence", confidence).confidence != _ENTROPY:
            raise UserError(
                f"process.{key}={value} needs the entropy, which process.confidence={confidence} does not have; "
                "set process.confidence=neg_entropy"
            )
        return rule
    return None


class Pool(ABC):
    """What the constructions of progressive unmasking have in common: rows, reveals, refills and state.

    A construction says how new rows are masked, what of a row is scored, how many positions a block reveals next, and
    when it is done.

    Args:
        mask_id: a token that no example holds.
        shard: which rows of the global batch are trained here.
        seed: of all noise.
        device: where the rows are kept.
        also: what is revealed at once beyond the count, as far as the model is sure; see `parallel_rule`.
        confidence: what orders the reveals: a key of `reveal.ORDERS`.
        block_size: S, of rows in blocks; None: a row is one block.
    """

    def __init__(
        self,
        *,
        mask_id: int,
        shard: RowShard,
        also: RevealRule | None,
        confidence: str,
        block_size: int | None,
        seed: int,
        device: torch.device | str | None,
    ) -> None:
        self.mask_id = mask_id
        self.shard = shard
        self.also = also
        self.order = choose(ORDERS, "confidence", confidence)
        self.block_size = block_size
        self.requirements = Requirements(confidence=self.order.confidence, block_size=block_size)
        self.seed = seed
        self.device = torch.device(device or "cpu")
        self.step = 0
        self.first_round = 0
        """j of the examples `stream[r + j B]` that a new pool starts with."""
        self._num_refills = torch.zeros((), dtype=torch.long, device=self.device)
        self._num_revealed = torch.zeros((), dtype=torch.long, device=self.device)
        self._upcoming: Prefetcher | None = None
        self.pool: PoolRows | None = None
        self.estimate: Float[Tensor, "b L D"] | None = None
        """What a self-conditioned model said of the rows in the last step."""

    @abstractmethod
    def _first_rows(self, clean: CleanBatch, example: Int[Tensor, "b"], order: Int[Tensor, "b N"]) -> PoolRows:
        """The rows that a pool starts with; `order`, a permutation of the global batch's blocks, spreads them."""

    @abstractmethod
    def _fresh_rows(self, clean: CleanBatch, example: Int[Tensor, "b"]) -> PoolRows:
        """Rows that take the place of those that are done."""

    @abstractmethod
    def _as_batch(self, pool: PoolRows) -> MaskedBatch: ...

    @abstractmethod
    def _count(self, pool: PoolRows) -> Int[Tensor, "b N"]:
        """How many positions each block reveals after this step, the surest first."""

    @abstractmethod
    def _advance(self, pool: PoolRows) -> Bool[Tensor, "b N"]:
        """Moves `pool.stage` on, after the reveals; returns which blocks are done."""

    @property
    def num_refills(self) -> int:
        """Examples that have entered the pool. Waits for the device, and for the other processes."""
        return int(self.shard.peers.sum(self._num_refills.cpu()))

    @property
    def examples_seen(self) -> int:
        return self.num_refills

    def next_batch(self, stream: ExampleStream) -> MaskedBatch:
        """The pool as it stands, with examples of `stream` in place of rows that are done.

        The loss is `sum(weight * nll) / B`. Called again before `observe`, it gives the same batch.
        """
        self.pool = self._first_pool(stream) if self.pool is None else self._refilled(self.pool, stream)
        return replace(self._as_batch(self.pool), is_carried=True, estimate=self._carried(self.pool))

    def _carried(self, pool: PoolRows) -> Float[Tensor, "b L D"] | None:
        """What the model said in the last step of rows that are still here, where they are masked: as in decoding."""
        if self.estimate is None:
            return None
        is_known = pool.is_masked & (pool.visit > 0).unsqueeze(1)
        return torch.where(is_known.unsqueeze(-1), self.estimate, 0.0)

    @torch.no_grad()
    def observe(self, batch: MaskedBatch, stats: TokenStats) -> None:
        """Moves every row of `batch`, the last one, a step on: reveals, retires, refills at the next call.

        `stats` is what the model said of it before its update, of the confidence that `requirements` names.
        """
        pool = self.pool
        assert pool is not None, "observe follows next_batch"
        if stats.statistic not in (None, self.order.confidence):
            raise UserError(
                f"this pool orders by {self.order.confidence}, but is told {stats.statistic}; give "
                "TokenStats.from_logits(.., confidence=pool.requirements.confidence), or a Denoiser this `confidence`"
            )
        is_revealed = self._choose(pool, batch, stats)
        self._num_revealed = is_revealed.sum()
        pool.reveal(is_revealed)
        pool.finish(self._advance(pool))
        pool.visit = pool.visit + 1
        # Of numbers that are not finite, whose step changes nothing, nothing is kept either.
        self.estimate = None if stats.estimate is None else stats.estimate.nan_to_num(0.0, posinf=0.0, neginf=0.0)
        self.step += 1

    def _choose(self, pool: PoolRows, batch: MaskedBatch, stats: TokenStats) -> Bool[Tensor, "b L"]:
        """What each block reveals. (One that is done has nothing to reveal.)"""
        position = torch.arange(pool.x0.shape[1], device=self.device)
        score = self.order.score(
            batch.scatter(stats.confidence, -torch.inf),
            lambda: noise.uniform(
                self.seed, Purpose.ORDER, pool.example.unsqueeze(1), pool.visit.unsqueeze(1), position
            ),
        )
        score, count = pool.in_blocks(score), self._count(pool)
        is_revealed = most_confident(score, pool.masked, count)
        if self.also is not None:
            state = RevealState(
                score=score,
                eligible=pool.masked,
                top1=pool.in_blocks(batch.scatter(stats.top1, 0.0)),
                entropy=pool.in_blocks(batch.scatter(-stats.confidence, 0.0)) if self._knows_entropy else None,
                step=pool.visit.unsqueeze(1).expand_as(count),
                num_masked=pool.masked.sum(dim=-1),
                num_masked_at_start=pool.num_maskable,
            )
            is_revealed = is_revealed | self.also(state)
        return is_revealed.flatten(1)

    @property
    def _knows_entropy(self) -> bool:
        return self.order.confidence == _ENTROPY

    def _first_pool(self, stream: ExampleStream) -> PoolRows:
        rows = self.shard.index(self.device)
        example = rows + self.first_round * self.shard.total
        clean = examples_of(stream, example.cpu()).to(self.device)
        num_blocks = self._num_blocks(clean)
        order = noise.permute(blocks_of(rows, num_blocks), self.shard.total * num_blocks, self.seed, Purpose.STAGE)
        self._num_refills = self._num_refills + len(rows)
        return self._first_rows(clean, example, order)

    def _num_blocks(self, clean: CleanBatch) -> int:
        return count_blocks(clean.x0.shape[1], self.block_size)

    def _refilled(self, pool: PoolRows, stream: ExampleStream) -> PoolRows:
        """The pool with new examples where a row is done."""
        number = pool.example + self.shard.total
        if self._upcoming is None:
            self._upcoming = Prefetcher(stream, number.cpu(), stride=self.shard.total, device=self.device)
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
        own = torch.stack([self._num_refills, self.pool.is_done.sum(), self._num_revealed])
        entered, finished, revealed = self.shard.peers.sum(own.cpu()).tolist()
        return {
            "puma/steps_per_example": self.step * self.shard.known / max(1, entered),  # so far, on average
            "puma/finished_share": finished / self.shard.known,
            "puma/revealed_per_row": revealed / self.shard.known,
        }

    def state_dict(self) -> dict[str, Any]:
        """Rows, counters and what the model said last: tensors and numbers."""
        return {
            "step": self.step,
            "first_turn": self.first_round,
            "num_refills": self.num_refills,
            "estimate": None if self.estimate is None else self.shard.peers.gather(self.estimate),
            "pool": None
            if self.pool is None
            else {name: self.shard.peers.gather(rows) for name, rows in vars(self.pool).items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`, bit for bit.

        Raises:
            UserError: the pool had another number of rows.
        """
        shard = self.shard
        if state["pool"] is not None and (held := len(state["pool"]["x0"])) != shard.known:
            raise UserError(f"the state of a pool of {held} rows does not fit one of {shard.known}; make one of {held}")
        self.step, self.first_round = state["step"], state["first_turn"]
        self._num_refills = torch.full_like(self._num_refills, state["num_refills"] if shard.peers.is_main else 0)
        self._upcoming = None  # a function of the pool's examples
        estimate = state["estimate"]
        self.estimate = None if estimate is None else self.shard.own(estimate).to(self.device)
        self.pool = (
            None
            if state["pool"] is None
            else PoolRows(**{name: self.shard.own(t).to(self.device) for name, t in state["pool"].items()})
        )

    def drop_rows(self, state: dict[str, Any]) -> dict[str, Any]:
        """`state` without its rows: a new pool is to start, of examples that no row of the old one has reached."""
        if state["pool"] is None:
            return state
        turn = int(state["pool"]["example"].max()) // self.shard.total
        return {**state, "first_turn": turn + 1, "pool": None, "estimate": None}
