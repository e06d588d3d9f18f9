"""The rows of a pool that is trained on again and again: storage, refills and state. The algorithms are in `puma.py`.

Row r of the global batch holds, one after the other, the examples `stream[r + j B]`. Its noise is keyed by the example
and by the number of steps that the example has been visited, so a pool is the same however many ranks share the batch.

In blocks, each block of a row is at a stage of its own. A block that is done is visible as a whole, so out of the loss;
the row is done when all its blocks are.

All is kept on `device`, in shapes that do not depend on the model's confidences. A step's batch has as many entries as
positions are scored, which only the device knows. So rows are renewed as soon as `observe` has revealed, before the
weights are updated: their number is on the CPU while the device is still busy with the update.

Dimensions: B rows of the global batch, b rows of this process, N blocks of a row (1 in plain diffusion), S positions of
a block, L of a row, D width of the model.
"""

from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from unmask import noise
from unmask.blocks import blocks_of, count_blocks
from unmask.config.settings import as_section
from unmask.data.stream import ExampleStream, Prefetcher, examples_of
from unmask.errors import UserError
from unmask.masking.pool_rows import PoolRows, check_rows
from unmask.masking.process import ProcessContext, Requirements, RowShard, check_count, make_batch
from unmask.masking.uniform import BLOCK_SIZE
from unmask.noise import Purpose
from unmask.reveal import ORDERS, RevealSettings, RevealState
from unmask.types import AsyncCopy, CleanBatch, MaskedBatch, TokenSpec, TokenStats

_ENTROPY = "neg_entropy"


class PoolConfig(RevealSettings):
    """The settings that all pools have."""

    aliases: ClassVar[dict[str, str]] = {"block_length": "block_size"}

    name: str
    block_size: int | None = Field(None, ge=1, description=BLOCK_SIZE)

    @model_validator(mode="after")
    def _check_entropy(self) -> "PoolConfig":
        if getattr(self.rule(), "needs_entropy", False) and ORDERS[self.order].confidence != _ENTROPY:
            key = next(key for key in self.exclusive if getattr(self, key) is not None)
            raise ValueError(
                f"process.{key}={getattr(self, key)} needs the entropy, which process.order={self.order} does not "
                f"have; set process.order={_ENTROPY}"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class _Renewal:
    """Rows with new ones in place of those of `old` that are done."""

    old: dict[str, Tensor]
    stream: ExampleStream
    rows: PoolRows
    counts: AsyncCopy
    """Numbers of scored positions, and of new rows."""

    def is_of(self, rows: PoolRows) -> bool:
        """True if it was made from these rows, as they are now."""
        return all(self.old[name] is own for name, own in vars(rows).items())


class Pool(ABC):
    """The storage of a progressive unmasking process: its rows, their next examples, its counters and its state.

    A construction of progressive unmasking adds `first_rows` and `fresh_rows`, and writes `next_batch` and `observe`
    out of these parts; see `puma.py`.

    Args:
        config: the settings; they may be given as keywords instead, as in `PumaPool(num_stages=12, ...)`.
        mask_id: a token that no example holds.
        shard: the rows of the global batch that are trained here.
        eos_id: the end token, where answers have one.
        seed: keys all noise.
        device: where the rows are kept; default: the CPU.

    Raises:
        UserError: wrong settings.
    """

    Config: ClassVar[type[PoolConfig]]

    def __init__(
        self,
        config: Any = None,
        *,
        mask_id: int,
        shard: RowShard,
        eos_id: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        **settings: Any,
    ) -> None:
        self.config: Any = as_section(self.Config, config, settings, "process")
        self.mask_id = mask_id
        self.eos_id = eos_id
        self.shard = shard
        self.rule = self.config.rule()
        self.order = ORDERS[self.config.order]
        self.block_size: int | None = self.config.block_size
        self.requirements = Requirements(confidence=self.order.confidence, block_size=self.block_size)
        self.seed = seed
        self.device = torch.device(device or "cpu")
        self.step = 0
        self.first_turn = 0
        """j of the examples `stream[r + j B]` that a new pool starts with."""
        self.rows: PoolRows | None = None
        self.estimate: Float[Tensor, "b L D"] | None = None
        """The last step's estimate of a self-conditioned model for these rows."""
        self._stream: ExampleStream | None = None
        self._ahead: _Renewal | None = None
        self._num_scored: int | None = None  # of `rows`; None for those of a new pool
        self._num_refills = 0
        self._num_revealed = torch.zeros((), dtype=torch.long, device=self.device)
        self._prefetcher: Prefetcher | None = None

    @classmethod
    def from_config(cls, config: Any, context: ProcessContext) -> "Pool":
        """Builds the pool that `config` describes.

        Raises:
            UserError: blocks that do not fill a row.
        """
        tokens = context.tokens
        count_blocks(tokens.length, config.block_size)
        return cls(
            config,
            mask_id=tokens.mask_id,
            eos_id=tokens.eos_id,
            shard=context.shard,
            seed=context.seed,
            device=context.device,
        )

    @abstractmethod
    def next_batch(self, stream: ExampleStream) -> MaskedBatch:
        """Returns the pool as it stands, with examples of `stream` in place of rows that are done.

        The loss is `sum(weight * nll) / B`. Called again before `observe`, it gives the same batch.
        """

    @abstractmethod
    def observe(self, batch: MaskedBatch, stats: TokenStats) -> None:
        """Reveals more of every row of `batch`, the last one.

        Args:
            batch: what `next_batch` gave.
            stats: the model's statistics on it, before its update; `confidence` is the one that `requirements` names.
        """

    # --- examples --------------------------------------------------------------------------------

    @abstractmethod
    def first_rows(self, clean: CleanBatch, example: Int[Tensor, "b"], place: Int[Tensor, "b N"]) -> PoolRows:
        """Makes the rows of a new pool.

        Args:
            clean: its examples.
            example: their numbers, on the CPU.
            place: of each block among all B N of the global batch, in a random order, to spread their stages by.
        """

    @abstractmethod
    def fresh_rows(self, clean: CleanBatch, example: Int[Tensor, "b"], num_blocks: int) -> PoolRows:
        """Makes rows that may take a place, out of every row's next example and its number, which is on the CPU."""

    def renewed_rows(self, stream: ExampleStream) -> PoolRows:
        """Puts new rows in place of those that are done; returns all rows, as they stand now."""
        self._stream = stream
        ahead, self._ahead = self._ahead, None
        if self.rows is None:
            self.rows, self._prefetcher, self._num_scored = self.first_rows(*self._first_examples(stream)), None, None
            return self.rows
        # Rows that were made ahead count only for the rows and the stream that they were made from.
        if ahead is not None and not (ahead.stream is stream and ahead.is_of(self.rows)):
            ahead = self._prefetcher = None
        ahead = ahead or self._renew(self.rows, stream)
        self.rows = ahead.rows
        self._num_scored, num_refills = ahead.counts.wait().tolist()
        self._num_refills += num_refills
        return self.rows

    def renew_ahead(self) -> None:
        """Makes the next step's rows as soon as this one's have moved on: ends `observe`, before the update."""
        assert self.rows is not None
        assert self._stream is not None, "observe follows next_batch"
        assert self._ahead is None, "observe follows next_batch"
        # What the stream gets wrong is said when the rows are asked for: this step is whole.
        with suppress(Exception):
            self._ahead = self._renew(self.rows, self._stream)

    def _renew(self, old: PoolRows, stream: ExampleStream) -> _Renewal:
        if self._prefetcher is None:
            number = old.example.cpu() + self.shard.total
            self._prefetcher = Prefetcher(stream, number, stride=self.shard.total, device=self.device)
        else:
            self._prefetcher.restock(stream)
        new = self.fresh_rows(self._prefetcher.clean, self._prefetcher.number, old.num_blocks)
        is_done = old.is_done
        rows = PoolRows(
            **{
                name: torch.where(is_done if own.ndim == 1 else is_done.unsqueeze(1), getattr(new, name), own)
                for name, own in vars(old).items()
            }
        )
        counts = AsyncCopy(torch.stack([self._is_scored(rows).sum(), is_done.sum()]))
        self._prefetcher.take(is_done)
        return _Renewal(old=dict(vars(old)), stream=stream, rows=rows, counts=counts)

    def _is_scored(self, rows: PoolRows) -> Bool[Tensor, "b L"]:
        """True where masked, but for an answer that is not known: there `x0` holds the mask."""
        return rows.is_masked & (rows.x0 != self.mask_id)

    def _first_examples(self, stream: ExampleStream) -> tuple[CleanBatch, Int[Tensor, "b"], Int[Tensor, "b N"]]:
        row = self.shard.index(self.device)
        example = self.shard.index(torch.device("cpu")) + self.first_turn * self.shard.total
        clean = examples_of(stream, example).to(self.device)
        num_blocks = count_blocks(clean.x0.shape[1], self.block_size)
        place = noise.permute(blocks_of(row, num_blocks), self.shard.total * num_blocks, self.seed, Purpose.STAGE)
        self._num_refills += len(row)
        return clean, example, place

    # --- one step ----------------------------------------------------------------------------------

    def comes_back(self, rows: PoolRows) -> bool:
        """True unless the settings have each of `rows` leave after one step, so that no estimate of it is of use."""
        return True

    def batch_of(self, weight: Float[Tensor, "b L"]) -> MaskedBatch:
        """Returns the batch that scores what is masked of the renewed rows, marked as coming back if they do.

        It has a self-conditioned model's last estimate, as in decoding: of rows that are still here, where they are
        still masked.
        """
        rows = self.rows
        assert rows is not None, "batch_of follows renewed_rows"
        num_scored = None if self.device.type == "mps" else self._num_scored  # mps has no nonzero_static
        batch = make_batch(rows.x0, rows.xt(self.mask_id), self._is_scored(rows), weight, num_scored=num_scored)
        if not self.comes_back(rows):
            return batch
        if self.estimate is None:
            return replace(batch, is_carried=True)
        is_known = rows.is_masked & (rows.visit > 0).unsqueeze(1)
        return replace(batch, is_carried=True, estimate=torch.where(is_known.unsqueeze(-1), self.estimate, 0.0))

    def scores(self, rows: PoolRows, batch: MaskedBatch, stats: TokenStats) -> Float[Tensor, "b N S"]:
        """Returns the order's scores of the masked positions, larger = revealed earlier.

        Raises:
            UserError: the statistic is not the one that the order ranks by.
        """
        if stats.statistic not in (None, self.order.confidence):
            raise UserError(
                f"this pool orders by {self.order.confidence}, but is given {stats.statistic}; give "
                "TokenStats.from_logits(.., confidence=pool.requirements.confidence), or a Denoiser this `confidence`"
            )
        keys = rows.example.unsqueeze(1), rows.visit.unsqueeze(1), torch.arange(rows.x0.shape[1], device=self.device)
        confidence = batch.scatter(stats.confidence, -torch.inf)
        return rows.in_blocks(self.order.score(confidence, lambda: noise.uniform(self.seed, Purpose.ORDER, *keys)))

    def reveal_state(
        self, rows: PoolRows, batch: MaskedBatch, stats: TokenStats, score: Float[Tensor, "b N S"]
    ) -> RevealState:
        """Returns what a reveal rule may look at: the same as in decoding, block by block."""
        knows_entropy = self.order.confidence == _ENTROPY
        num_masked = rows.masked.sum(dim=-1)
        return RevealState(
            score=score,
            eligible=rows.masked,
            top1=rows.in_blocks(batch.scatter(stats.top1, 0.0)),
            entropy=rows.in_blocks(batch.scatter(-stats.confidence, 0.0)) if knows_entropy else None,
            step=rows.visit.unsqueeze(1).expand_as(num_masked),
            num_masked=num_masked,
            num_masked_at_start=rows.num_maskable,
        )

    def advance(
        self,
        rows: PoolRows,
        stats: TokenStats,
        *,
        reveal: Bool[Tensor, "b N S"],
        stage: Int[Tensor, "b N"],
        is_done: Bool[Tensor, "b N"],
    ) -> None:
        """Ends the step: shows `reveal` and the whole of blocks that are done, and moves every row on."""
        self._num_revealed = reveal.sum()
        rows.is_masked = rows.is_masked & ~(reveal | is_done.unsqueeze(-1)).flatten(1)
        rows.stage = stage
        rows.visit = rows.visit + 1
        # A step with numbers that are not finite leaves the weights as they were. The pool moves on all the same, but
        # does not hand such numbers to the next step.
        self.estimate = None if stats.estimate is None else stats.estimate.nan_to_num(0.0, posinf=0.0, neginf=0.0)
        self.step += 1

    # --- counters and state ------------------------------------------------------------------------

    @property
    def examples_seen(self) -> int:
        """Examples that have entered the pool. Collective: every rank must call it."""
        return int(self.shard.peers.sum(torch.tensor(self._num_refills)))

    def metrics(self) -> dict[str, float]:
        """Returns named values for the log. Waits for the device. Collective: every rank must call it.

        A row lives `1 / puma/finished_share` steps, on average over some lines. `puma/revealed_per_row` counts what
        `observe` chose to reveal, not what else of a block is shown once it is done.
        """
        if self.rows is None:
            return {}
        finished, revealed = torch.stack([self.rows.is_done.sum(), self._num_revealed]).tolist()
        own = torch.tensor([self._num_refills, finished, revealed])
        entered, finished, revealed = self.shard.peers.sum(own).tolist()
        return {
            "puma/steps_per_example": self.step * self.shard.known / max(1, entered),  # so far, on average
            "puma/finished_share": finished / self.shard.known,
            "puma/revealed_per_row": revealed / self.shard.known,
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns rows, counters and estimates: tensors and numbers. Collective; only rank 0's result is complete."""
        gather = self.shard.peers.gather
        return {
            "step": self.step,
            "first_turn": self.first_turn,
            "num_refills": self.examples_seen,
            "estimate": None if self.estimate is None else gather(self.estimate),
            "pool": None if self.rows is None else {name: gather(own) for name, own in vars(self.rows).items()},
        }

    def check_state(self, state: dict[str, Any], tokens: TokenSpec) -> None:
        """Checks a saved state: its counters, and names, shapes, formats and values of its rows.

        Raises:
            UserError: it is damaged, or of another pool; names the field.
        """
        for name in ("step", "first_turn", "num_refills"):
            check_count(state, name)
        saved, estimate = state.get("pool"), state.get("estimate")
        expected = (self.shard.known, tokens.length)
        if saved is not None:
            check_rows(saved, self.shard.known, self.block_size, tokens)
        if estimate is not None:
            is_floating = isinstance(estimate, Tensor) and estimate.is_floating_point() and estimate.ndim == 3
            if not (is_floating and estimate.shape[:2] == expected and bool(estimate.isfinite().all())):
                raise UserError(f"estimate: holds other than finite numbers, {expected} times the width")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`, bit for bit.

        Raises:
            UserError: the pool had another number of rows.
        """
        shard, saved, estimate = self.shard, state["pool"], state["estimate"]
        if saved is not None and (held := len(saved["x0"])) != shard.known:
            raise UserError(f"the state of a pool of {held} rows does not fit one of {shard.known}; make one of {held}")
        self.step, self.first_turn = state["step"], state["first_turn"]
        # Counters are summed over the ranks, so one of them holds what all had.
        self._num_refills = state["num_refills"] if shard.peers.is_main else 0
        self._prefetcher = self._ahead = None  # functions of the rows
        self.estimate = None if estimate is None else shard.own(estimate).to(self.device)
        self.rows = None
        if saved is not None:
            self.rows = PoolRows(**{name: shard.own(value).to(self.device) for name, value in saved.items()})

    def drop_rows(self, state: dict[str, Any]) -> dict[str, Any]:
        """Returns `state` without rows: a new pool starts, with examples that no row of the old one has reached."""
        if state["pool"] is None:
            return state
        last_turn = int(state["pool"]["example"].max()) // self.shard.total
        return {**state, "first_turn": last_turn + 1, "pool": None, "estimate": None}
