"""Readers: which positions of a canvas the model reads in a decoding step, and what it keeps of the others.

`NoCache` reads whole canvases with any predictor. `UpToBlock`, `UpToOwnBlock`, `FullCanvas` and `Guided` read a
`Denoiser` without a cache; `Cached` reads a window of each row and keeps keys and values of the rest. The windows of a
causal model and of a block model are exact. For a model that sees all positions a cache is an approximation, as its
entries were computed when other positions were still masked: `PrefixWindow` and `DualWindow` (Fast-dLLM, 2505.22618),
refreshed every few steps if asked (dKV-Cache, 2505.15781). `SelfConditioned` adds the prediction of the last step to
what is read.

Dimensions: B rows, b rows that are still open, L positions, M positions asked for, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.errors import UserError
from unmask.models.attention import KeyValueCache
from unmask.models.denoiser import Denoiser, scatter_to_canvas
from unmask.models.loops import repeated
from unmask.types import Prediction, Query


@runtime_checkable
class Predictor(Protocol):
    """Answers a query about the flat positions `at` (M,) of `xt` (B, L), as `Denoiser.predict` does."""

    def __call__(self, xt: Int[Tensor, "B L"], at: Int[Tensor, "M"], query: Query) -> Prediction: ...


@dataclass(frozen=True)
class Blocks:
    """A span of positions of each row, from `start` up to `stop` (exclusive)."""

    start: Int[Tensor, "b"]
    stop: Int[Tensor, "b"]
    width: int | None = None
    """`stop - start`, if that is known to be the same in all rows."""


@runtime_checkable
class Reader(Protocol):
    """Reads the open rows of canvases, step after step."""

    def __call__(self, xt: Int[Tensor, "b L"], at: Int[Tensor, "M"], query: Query, blocks: Blocks) -> Prediction:
        """Answers `query` about the flat positions `at` of `xt`, which lie in the rows' current `blocks`."""
        ...

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        """Drops all rows but these."""
        ...


OpenReader = Callable[[Int[Tensor, "B L"]], Reader]
"""Makes the reader of these canvases, before their first step."""


@dataclass(frozen=True)
class NoCache:
    """Reads whole canvases in every step."""

    predict: Predictor

    def __call__(self, xt: Int[Tensor, "b L"], at: Int[Tensor, "M"], query: Query, blocks: Blocks) -> Prediction:
        return self.predict(xt, at, query)

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        pass


@dataclass(frozen=True)
class Looped:
    """Reads as `inner` does, with the layers of `model.loops` run `times` times."""

    inner: Reader
    model: Denoiser
    times: int

    def __call__(self, xt: Int[Tensor, "b L"], at: Int[Tensor, "M"], query: Query, blocks: Blocks) -> Prediction:
        with repeated(self.model.backbone, self.times):
            return self.inner(xt, at, query, blocks)

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        self.inner.keep(rows)


class HiddenStateReader(ABC):
    """A reader in two parts: which positions it reads in a step, and the hidden states that it computes there."""

    model: Denoiser

    def __call__(self, xt: Int[Tensor, "b L"], at: Int[Tensor, "M"], query: Query, blocks: Blocks) -> Prediction:
        return self.model.predict_from_hidden(self.hidden(xt, at, self.read(xt, blocks)), query)

    @abstractmethod
    def read(self, xt: Int[Tensor, "b L"], blocks: Blocks) -> Blocks:
        """Returns the positions of each row that are read in this step; called once a step."""

    @abstractmethod
    def hidden(
        self,
        xt: Int[Tensor, "b L"],
        at: Int[Tensor, "M"],
        read: Blocks,
        estimate: Float[Tensor, "b L D"] | None = None,
    ) -> Float[Tensor, "M D"]:
        """Computes hidden states at the flat positions `at`, which lie in `read`; see `Denoiser.hidden`."""

    def keep(self, rows: Int[Tensor, "b"]) -> None:  # noqa: B027  (most keep nothing of a row)
        """Drops all rows but these."""


class UpToBlock(HiddenStateReader):
    """Reads canvases up to the block that is being decoded: a block model sees nothing of what follows."""

    def __init__(self, model: Denoiser) -> None:
        self.model = model

    def read(self, xt: Int[Tensor, "b L"], blocks: Blocks) -> Blocks:
        return blocks

    def hidden(
        self,
        xt: Int[Tensor, "b L"],
        at: Int[Tensor, "M"],
        read: Blocks,
        estimate: Float[Tensor, "b L D"] | None = None,
    ) -> Float[Tensor, "M D"]:
        stop = int(read.stop.max())
        row, position = at // xt.shape[1], at % xt.shape[1]
        return self.model.hidden(xt[:, :stop], row * stop + position, None if estimate is None else estimate[:, :stop])


class FullCanvas(UpToBlock):
    """Reads whole canvases."""

    def read(self, xt: Int[Tensor, "b L"], blocks: Blocks) -> Blocks:
        return Blocks(torch.zeros_like(blocks.start), torch.full_like(blocks.stop, xt.shape[1]))


def _for_equal(
    key: Int[Tensor, "b"],
    row: Int[Tensor, "M"],
    hidden: Callable[[int, Int[Tensor, "g"], Int[Tensor, "m"]], Float[Tensor, "m D"]],
) -> Float[Tensor, "M D"]:
    """Computes hidden states of the rows of equal `key` together.

    Args:
        key: a number of each row.
        row: the row of each position asked for.
        hidden: given a key, its rows in ascending order, and the indices in `row` of their positions, computes the
            hidden states of these.
    """
    parts: list[Float[Tensor, "m D"]] = []
    places: list[Int[Tensor, "m"]] = []
    for each in key.unique().tolist():
        place = (key[row] == each).nonzero().squeeze(1)
        parts.append(hidden(each, (key == each).nonzero().squeeze(1), place))
        places.append(place)
    return torch.cat(parts)[torch.cat(places).argsort()]


class UpToOwnBlock(UpToBlock):
    """Reads each row up to its own block, with a model that would see what follows."""

    def hidden(
        self,
        xt: Int[Tensor, "b L"],
        at: Int[Tensor, "M"],
        read: Blocks,
        estimate: Float[Tensor, "b L D"] | None = None,
    ) -> Float[Tensor, "M D"]:
        row, position = at // xt.shape[1], at % xt.shape[1]

        def up_to(stop: int, rows: Int[Tensor, "g"], place: Int[Tensor, "m"]) -> Float[Tensor, "m D"]:
            own = torch.searchsorted(rows, row[place]) * stop + position[place]
            return self.model.hidden(xt[rows, :stop], own, None if estimate is None else estimate[rows, :stop])

        return _for_equal(read.stop, row, up_to)


class Guided:
    """Classifier-free guidance: `(1 + scale) log p(. | prompt) - scale log p(.)`, the prompt masked in the latter.

    Logits are linear in the hidden states, so these are combined (2207.12598; for masked diffusion 2410.18514).
    """

    def __init__(self, model: Denoiser, scale: float, xt: Int[Tensor, "B L"]) -> None:
        self.model, self.scale = model, scale
        self.is_prompt = xt != model.mask_id

    def __call__(self, xt: Int[Tensor, "b L"], at: Int[Tensor, "M"], query: Query, blocks: Blocks) -> Prediction:
        without_prompt = xt.masked_fill(self.is_prompt, self.model.mask_id)
        both = self.model.hidden(torch.cat([xt, without_prompt]), torch.cat([at, at + xt.numel()]))
        conditional, unconditional = both.chunk(2)
        return self.model.predict_from_hidden((1 + self.scale) * conditional - self.scale * unconditional, query)

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        self.is_prompt = self.is_prompt[rows]


@runtime_checkable
class Window(Protocol):
    """Chooses the positions of each row that are read in a step; cache entries of the others stay."""

    def __call__(self, blocks: Blocks) -> Blocks: ...

    def keep(self, rows: Int[Tensor, "b"]) -> None: ...


class BlockWindow:
    """For block models: reads the current block, and each finished block once. Exact."""

    def __init__(self, xt: Int[Tensor, "B L"]) -> None:
        self.num_finished = torch.zeros(len(xt), dtype=torch.long, device=xt.device)

    def __call__(self, blocks: Blocks) -> Blocks:
        start, self.num_finished = self.num_finished, blocks.start
        return Blocks(start, blocks.stop)

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        self.num_finished = self.num_finished[rows]


class CausalWindow:
    """For causal models: reads all prompts in the first step, padded to the longest; then one token a step. Exact.

    A causal model predicts position i at i - 1, so `Denoiser.hidden_within` reads a window one position to the left.
    Cache entries that the first pass writes behind a shorter prompt are replaced before any position attends to them.

    Raises:
        UserError: a canvas without a prompt, or with something given after what is masked.
    """

    def __init__(self, xt: Int[Tensor, "B L"], mask_id: int) -> None:
        is_given = xt != mask_id
        if (~is_given[:, :1]).any() or (is_given[:, 1:] & ~is_given[:, :-1]).any():
            raise UserError(
                "a causal model fills in what follows a prompt: at least one token must be given, and none after the "
                "first that is masked; use a model without model.causal for other canvases"
            )
        self.has_read_prompts = False

    def __call__(self, blocks: Blocks) -> Blocks:
        if self.has_read_prompts:
            return blocks
        self.has_read_prompts = True
        longest = int(blocks.stop.max()) - 1
        return Blocks(torch.ones_like(blocks.start), torch.full_like(blocks.stop, longest + 1), width=longest)

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        pass


class _Refreshed:
    """Reads the whole canvas at the start of every block and, if set, every `every` steps; else part of it."""

    def __init__(self, xt: Int[Tensor, "B L"], every: int | None = None) -> None:
        self.length, self.every = xt.shape[1], every
        self.block = torch.full((len(xt),), -1, device=xt.device)
        self.age = torch.zeros_like(self.block)

    def __call__(self, blocks: Blocks) -> Blocks:
        is_due = self.block != blocks.start
        if self.every is not None:
            is_due |= self.age >= self.every
        self.block = blocks.start
        self.age = torch.where(is_due, 1, self.age + 1)
        part = self._part(blocks)
        return Blocks(part.start.masked_fill(is_due, 0), part.stop.masked_fill(is_due, self.length))

    def _part(self, blocks: Blocks) -> Blocks:
        raise NotImplementedError

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        self.block, self.age = self.block[rows], self.age[rows]


class PrefixWindow(_Refreshed):
    """Prefix cache: reads the current block and all that follows it."""

    def _part(self, blocks: Blocks) -> Blocks:
        return Blocks(blocks.start, torch.full_like(blocks.stop, self.length))


class DualWindow(_Refreshed):
    """Dual cache: reads the current block alone."""

    def _part(self, blocks: Blocks) -> Blocks:
        return blocks


class Cached(HiddenStateReader):
    """Reads a window of each row, and keeps keys and values of the rest."""

    def __init__(self, model: Denoiser, window: Window, xt: Int[Tensor, "B L"]) -> None:
        self.model, self.window = model, window
        self.cache = KeyValueCache(xt.shape[1], len(xt))

    def read(self, xt: Int[Tensor, "b L"], blocks: Blocks) -> Blocks:
        return self.window(blocks)

    def hidden(
        self,
        xt: Int[Tensor, "b L"],
        at: Int[Tensor, "M"],
        read: Blocks,
        estimate: Float[Tensor, "b L D"] | None = None,
    ) -> Float[Tensor, "M D"]:
        widths = read.stop - read.start
        width = read.width if read.width is not None else int(widths[0])
        if read.width is not None or (widths == width).all():  # copies neither canvases nor the cache
            return self.model.hidden_within(xt, at, start=read.start, width=width, cache=self.cache, estimate=estimate)
        row, position = at // xt.shape[1], at % xt.shape[1]

        def within(width: int, rows: Int[Tensor, "g"], place: Int[Tensor, "m"]) -> Float[Tensor, "m D"]:
            return self.model.hidden_within(
                xt[rows],
                torch.searchsorted(rows, row[place]) * xt.shape[1] + position[place],
                start=read.start[rows],
                width=width,
                cache=self.cache,
                rows=rows,
                estimate=None if estimate is None else estimate[rows],
            )

        return _for_equal(widths, row, within)

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        self.cache.keep(rows)
        self.window.keep(rows)


class SelfConditioned:
    """Gives a self-conditioned model its estimate from the last step, at every masked position that is read.

    The first step starts from zero. One pass makes both the answer and the next estimate, so there are as many passes
    as without. With a block model or a cache, estimates outside the positions that are read stay as they are.
    """

    def __init__(self, inner: HiddenStateReader, xt: Int[Tensor, "B L"]) -> None:
        self.inner, self.model = inner, inner.model
        self.estimate = self.model.zero_estimate(xt)

    def __call__(self, xt: Int[Tensor, "b L"], at: Int[Tensor, "M"], query: Query, blocks: Blocks) -> Prediction:
        is_masked = xt == self.model.mask_id
        read = self.inner.read(xt, blocks)
        position = torch.arange(xt.shape[1], device=xt.device)
        is_guessed = is_masked & (position >= read.start.unsqueeze(1)) & (position < read.stop.unsqueeze(1))
        where = is_guessed.flatten().index_fill(0, at, True).nonzero().squeeze(1)
        self._clear(~is_masked)  # revealed since the last step
        hidden = self.inner.hidden(xt, where, read, self.estimate)
        self._clear(is_guessed)
        self.estimate = self.estimate + scatter_to_canvas(
            self.model.expected_embedding(hidden, query.forbidden), where, is_guessed
        )
        return self.model.predict_from_hidden(hidden.index_select(0, torch.searchsorted(where, at)), query)

    def _clear(self, where: Bool[Tensor, "b L"]) -> None:
        self.estimate = self.estimate.masked_fill(where.unsqueeze(-1), 0.0)

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        self.estimate = self.estimate[rows]
        self.inner.keep(rows)
