"""The contract between the trainer and every masking process.

Dimensions: B rows of the global batch, b rows of this process, N blocks of a row, L positions, M scored positions.

Batches that depend on nothing that the model says.
"""

from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from unmask.blocks import over_positions
from unmask.data.stream import ExampleStream
from unmask.errors import UserError
from unmask.peers import ALONE, Peers
from unmask.types import MaskedBatch, TokenSpec, TokenStats

PAD_MULTIPLE = 128  # scored positions are padded to a multiple of this, so that few shapes occur


@dataclass(frozen=True)
class Requirements:
    """What a process needs of the model; asked once, when the model is built."""

    confidence: str | None = None
    """The statistic that `TokenStats.confidence` must hold, a key of `reveal.CONFIDENCES`; None = any."""
    is_causal: bool = False
    """Whether a position may see only itself and those before it."""
    block_size: int | None = None
    """S, of a model that predicts a block of S positions from the clean blocks before it; None: from all positions."""


@dataclass(frozen=True, kw_only=True)
class RowShard:
    """The rows of a global batch of `total` that this process trains: from `start` up to `stop`."""

    total: int
    start: int
    stop: int
    peers: Peers = ALONE
    """The processes that train the others, in the order of the ranks. ALONE, with rows that are not all: a process that
    cannot ask them; it counts and saves its own rows alone."""

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= self.total or self.total < 1:
            raise UserError(
                f"RowShard(total={self.total}, start={self.start}, stop={self.stop}): give 0 <= start <= stop <= total"
            )

    @staticmethod
    def whole(total: int) -> "RowShard":
        """All rows: there is one process."""
        return RowShard(total=total, start=0, stop=total)

    @property
    def size(self) -> int:
        """b, the number of rows."""
        return self.stop - self.start

    def index(self, device: torch.device) -> Int[Tensor, "b"]:
        """The rows' numbers in the global batch."""
        return torch.arange(self.start, self.stop, device=device)

    @property
    def known(self) -> int:
        """Of how many rows this process and its peers can tell: B, or b where it has none."""
        return self.total if self.peers.size > 1 else self.size

    def own(self, rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "b ..."]:
        """Of the `known` rows, those of this process."""
        return rows[self.start : self.stop] if self.peers.size > 1 else rows


@dataclass(frozen=True, kw_only=True)
class ProcessContext:
    """What a process is built with, beside its own configuration."""

    tokens: TokenSpec
    shard: RowShard
    seed: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@runtime_checkable
class MaskingProcess(Protocol):
    """How training sequences are masked. The trainer knows no more of a method than this.

    A class that is named in `process.name` also has `Config`, a `section.Section` with the field `name`,
    and `from_config(config, context)`.
    """

    requirements: Requirements

    @property
    def examples_seen(self) -> int:
        """Examples that the global batch's rows have drawn from the stream so far. All processes ask together."""
        ...

    def next_batch(self, stream: ExampleStream) -> MaskedBatch:
        """The batch of the next step."""
        ...

    def observe(self, batch: MaskedBatch, stats: TokenStats) -> None:
        """Takes in what the model made of `batch`; called once after every `next_batch`."""
        ...

    def metrics(self) -> dict[str, float]:
        """Named values for the log, of the global batch. All processes ask together."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Of the global batch, in the main process; the others, which ask too, need not know it all."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes from the global batch's `state` what is this process's, however many processes wrote it."""
        ...


def score_masked(
    x0: Int[Tensor, "b L"], xt: Int[Tensor, "b L"], mask_id: int, weight: Float[Tensor, "b *N"]
) -> MaskedBatch:
    """A batch that scores exactly the masked positions, each with its row's or block's weight.

    A prompt that is hidden holds the mask in `x0` too, and is not scored. Waits for the device once.
    """
    return score(x0, xt, (xt == mask_id) & (x0 != mask_id), over_positions(weight, x0.shape[1]))


def score(
    x0: Int[Tensor, "b L"], xt: Int[Tensor, "b L"], is_scored: Bool[Tensor, "b L"], weights: Float[Tensor, "b L"]
) -> MaskedBatch:
    """A batch that scores these positions, with their weights. Waits for the device once."""
    scored = is_scored.flatten().nonzero().squeeze(1)
    weight = weights.flatten()[scored]
    missing = -len(scored) % PAD_MULTIPLE
    return MaskedBatch(
        x0=x0,
        xt=xt,
        scored=torch.nn.functional.pad(scored, (0, missing), value=x0.numel()),
        weight=torch.nn.functional.pad(weight, (0, missing)),
    )


class IndependentBatches(ABC):
    """A process whose batch is a function of the step: every step takes new examples.

    Batches are made on the CPU, the next one in a background thread where `device` is another, so that no step waits
    for its data, and none for the device.
    """

    requirements = Requirements()

    def __init__(self, *, shard: RowShard, seed: int = 0, device: torch.device | str | None = None) -> None:
        self.shard = shard
        self.seed = seed
        self.device = torch.device(device or "cpu")
        self.step = 0
        is_idle = self.device.type != "cpu"  # else a thread would only take cores from the step
        self._reader = ThreadPoolExecutor(1, "batches") if is_idle else None
        self._ahead: tuple[ExampleStream, int, Future[MaskedBatch]] | None = None

    @abstractmethod
    def _make(self, stream: ExampleStream, step: int) -> MaskedBatch:
        """The batch of `step`, on the CPU."""

    @property
    def examples_seen(self) -> int:
        return self.step * self.shard.known

    def next_batch(self, stream: ExampleStream) -> MaskedBatch:
        """The batch of this step, until `observe` ends it. The loss is `sum(weight * nll) / B`."""
        batch = self._read(stream)
        if self._reader is not None:
            self._ahead = stream, self.step + 1, self._reader.submit(self._make, stream, self.step + 1)
        return self._agree(batch).to(self.device)

    def _agree(self, batch: MaskedBatch) -> MaskedBatch:
        """What all processes must know before a batch can be used; `_make`, in the thread, cannot ask them."""
        return batch

    def _read(self, stream: ExampleStream) -> MaskedBatch:
        """The batch of this step: the one made ahead, unless this is the first step here, or another stream."""
        if self._ahead is not None and self._ahead[:2] == (stream, self.step):
            return self._ahead[2].result()
        return self._make(stream, self.step)

    def observe(self, batch: MaskedBatch, stats: TokenStats) -> None:
        """The step is over; what the model said of it changes nothing."""
        self.step += 1

    def metrics(self) -> dict[str, float]:
        """Named values for the log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that the next batches depend on."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`, bit for bit."""
        self.step = state["step"]
