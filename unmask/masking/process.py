"""The contract between the trainer and every masking process, and what processes are made of.

Dimensions: B rows of the global batch, b rows of this process, N blocks of a row, L positions, M scored positions.
"""

from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from unmask.blocks import over_positions
from unmask.config import registry
from unmask.config.settings import Section, name_of
from unmask.data.stream import ExampleStream
from unmask.errors import UserError
from unmask.peers import ALONE, Peers
from unmask.types import MaskedBatch, TokenSpec, TokenStats

LARGEST_COUNT = 2**40
"""Largest step, example or visit of a saved state: products with the rows of a batch stay within 64 bits."""
PAD_MULTIPLE = 128  # scored positions are padded to a multiple of this, so that few shapes occur


@dataclass(frozen=True)
class Requirements:
    """The properties that a process needs of the model; read once, when the model is built."""

    confidence: str | None = None
    """The statistic that `TokenStats.confidence` must hold, a key of `reveal.CONFIDENCES`; None = any."""
    is_causal: bool = False
    """True if a position may see only itself and those before it."""
    block_size: int | None = None
    """S, for a model that predicts a block of S positions from the clean blocks before it; None: from all positions."""


@dataclass(frozen=True, kw_only=True)
class RowShard:
    """The rows of a global batch of `total` that this rank trains: from `start` up to `stop`."""

    total: int
    start: int
    stop: int
    peers: Peers = ALONE
    """The other ranks. With ALONE and a partial shard, counters and state cover this rank's rows only."""

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= self.total or self.total < 1:
            raise UserError(
                f"RowShard(total={self.total}, start={self.start}, stop={self.stop}): give 0 <= start <= stop <= total"
            )

    @staticmethod
    def whole(total: int) -> "RowShard":
        """Returns the shard of a single rank: all rows."""
        return RowShard(total=total, start=0, stop=total)

    @property
    def size(self) -> int:
        """b, the number of rows."""
        return self.stop - self.start

    def index(self, device: torch.device) -> Int[Tensor, "b"]:
        """Returns the rows' numbers in the global batch."""
        return torch.arange(self.start, self.stop, device=device)

    @property
    def known(self) -> int:
        """Number of rows that counters and state cover: B, or b where there are no peers to ask."""
        return self.total if self.peers.size > 1 else self.size

    def own(self, rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "b ..."]:
        """Selects this rank's rows from the `known` ones."""
        return rows[self.start : self.stop] if self.peers.size > 1 else rows


@dataclass(frozen=True, kw_only=True)
class ProcessContext:
    """Everything that a process is built with, beside its own configuration."""

    tokens: TokenSpec
    shard: RowShard
    seed: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@runtime_checkable
class MaskingProcess(Protocol):
    """The masking of training sequences. The trainer knows no more of a method than this.

    A class that is named in `process.name` also has `Config`, a `config.settings.Section` with the field `name`,
    and `from_config(config, context)`. It may have `check_state(state, tokens)`, which raises `UserError` for a state
    that is not safe to load: a checkpoint may come from anybody; and `about_unused()`, which returns a warning that
    names settings without effect, or None.
    """

    requirements: Requirements

    @property
    def examples_seen(self) -> int:
        """Examples that the global batch has drawn from the stream so far. Collective: every rank must call it."""
        ...

    def next_batch(self, stream: ExampleStream) -> MaskedBatch:
        """Returns the batch of this step; the same one until `observe` ends the step."""
        ...

    def observe(self, batch: MaskedBatch, stats: TokenStats) -> None:
        """Takes in the model's statistics on `batch`; called once after every `next_batch`, before the update."""
        ...

    def metrics(self) -> dict[str, float]:
        """Returns named values of the global batch for the log. Collective: every rank must call it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the global batch. Collective: every rank must call it; only rank 0's is complete."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes this rank's part of the global batch's `state`, however many ranks wrote it."""
        ...


def build_process(config: Section, context: ProcessContext) -> MaskingProcess:
    """Builds the process named `process.name`.

    Raises:
        UserError: its code fails, or it lacks a part of the protocol `MaskingProcess`.
    """
    process: MaskingProcess = registry.build("process", name_of(config), config, context)
    registry.require_parts("process", name_of(config), process, MaskingProcess)
    return process


def check_count(state: dict[str, Any], name: str) -> None:
    """Raises `UserError` unless `state[name]` is a number of steps or examples."""
    value = state.get(name)
    if type(value) is not int or not 0 <= value <= LARGEST_COUNT:
        raise UserError(f"{name}={str(value)[:40]}: is no count; the checkpoint is damaged, or was altered")


def make_batch(
    x0: Int[Tensor, "b L"],
    xt: Int[Tensor, "b L"],
    is_scored: Bool[Tensor, "b L"],
    weights: Float[Tensor, "b L"],
    *,
    num_scored: int | None = None,
) -> MaskedBatch:
    """Makes a batch that scores these positions, with their weights.

    Waits for the device once, unless their number `num_scored` is known.
    """
    if num_scored is None:
        scored = is_scored.flatten().nonzero().squeeze(1)
    else:
        scored = is_scored.flatten().nonzero_static(size=num_scored).squeeze(1)
    weight = weights.flatten()[scored]
    missing = -len(scored) % PAD_MULTIPLE
    return MaskedBatch(
        x0=x0,
        xt=xt,
        scored=torch.nn.functional.pad(scored, (0, missing), value=x0.numel()),
        weight=torch.nn.functional.pad(weight, (0, missing)),
    )


def masked_batch(
    x0: Int[Tensor, "b L"], xt: Int[Tensor, "b L"], mask_id: int, weight: Float[Tensor, "b *N"]
) -> MaskedBatch:
    """Makes a batch that scores exactly the masked positions, each with its row's or block's weight.

    A prompt that is hidden holds the mask in `x0` too, and is not scored. Waits for the device once.
    """
    return make_batch(x0, xt, (xt == mask_id) & (x0 != mask_id), over_positions(weight, x0.shape[1]))


class IndependentBatches(ABC):
    """A process whose batch is a function of the step alone: every step takes new examples.

    Batches are made on the CPU. Where `device` is another, a background thread makes the next one meanwhile, so that no
    step waits for its data.

    Args:
        shard: the rows of the global batch that are trained here.
        seed: keys all noise.
        device: where batches are sent.
    """

    requirements = Requirements()

    def __init__(self, *, shard: RowShard, seed: int = 0, device: torch.device | str | None = None) -> None:
        self.shard = shard
        self.seed = seed
        self.device = torch.device(device or "cpu")
        self.step = 0
        # On a CPU the thread would only take cores from the step.
        self._reader = ThreadPoolExecutor(1, "batches") if self.device.type != "cpu" else None
        self._ahead: tuple[ExampleStream, int, Future[MaskedBatch]] | None = None

    @abstractmethod
    def draw_batch(self, stream: ExampleStream, step: int) -> MaskedBatch:
        """Returns the batch of `step`, on the CPU. May run in a thread, so it must not ask other ranks."""

    def synchronise(self, batch: MaskedBatch) -> MaskedBatch:
        """Returns `batch` with what all ranks must know before it can be used. Collective."""
        return batch

    @property
    def examples_seen(self) -> int:
        """Examples drawn so far: a batch a step."""
        return self.step * self.shard.known

    def next_batch(self, stream: ExampleStream) -> MaskedBatch:
        """Returns the batch of this step, until `observe` ends it. The loss is `sum(weight * nll) / B`."""
        # The batch made ahead counts only for the step and the stream that it was made for.
        if self._ahead is not None and self._ahead[:2] == (stream, self.step):
            batch = self._ahead[2].result()
        else:
            batch = self.draw_batch(stream, self.step)
        if self._reader is not None:
            self._ahead = stream, self.step + 1, self._reader.submit(self.draw_batch, stream, self.step + 1)
        return self.synchronise(batch).to(self.device)

    def observe(self, batch: MaskedBatch, stats: TokenStats) -> None:
        """Ends the step; the statistics change nothing."""
        self.step += 1

    def metrics(self) -> dict[str, float]:
        """Returns named values for the log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns all that the next batches depend on."""
        return {"step": self.step}

    def check_state(self, state: dict[str, Any], tokens: TokenSpec) -> None:
        """Checks a saved state.

        Raises:
            UserError: it is damaged; names the field.
        """
        check_count(state, "step")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`, bit for bit."""
        self.step = state["step"]
