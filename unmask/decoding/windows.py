"""How a model reads canvases that are being filled in: anew in every step, or with what it remembers of them.

A cache of keys and values is exact for a model that sees only the blocks up to its own (`block`). For a model that sees
all positions it is an approximation: what is remembered was read when other positions were still masked (`prefix` and
`dual`, Fast-dLLM, 2505.22618; reading all again every few steps: dKV-Cache, 2505.15781).

Dimensions: B rows, b rows that are still open, L positions, M positions asked for, D width.

Reading with a self-conditioned model: what it said in a step is told to it in the next (`models/conditioning.py`).

Dimensions: B rows, b rows that are still open, L positions, M positions asked for, n that are read, D width.
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
from unmask.types import Prediction, Query


@runtime_checkable
class Predictor(Protocol):
    """What is asked of the flat positions `at` (M,) of `xt` (B, L). As `Denoiser.predict`."""

    def __call__(self, xt: Int[Tensor, "B L"], at: Int[Tensor, "M"], ask: Query) -> Prediction: ...


@dataclass(frozen=True)
class Blocks:
    """The block that each row is being decoded in: its positions are `start` up to `stop`."""

    start: Int[Tensor, "b"]
    stop: Int[Tensor, "b"]
    width: int | None = None
    """`stop - start`, if that is known to be the same in all rows."""


@runtime_checkable
class Reader(Protocol):
    """Reads the open rows of canvases, step after step."""

    def __call__(self, xt: Int[Tensor, "b L"], at: Int[Tensor, "M"], ask: Query, blocks: Blocks) -> Prediction:
        """What is asked of the flat positions `at` of `xt`, which lie in the rows' `blocks`."""
        ...

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        """From now on only these of the rows come."""
        ...


Reading = Callable[[Int[Tensor, "B L"]], Reader]
"""Starts to read canvases, from what is given of them on."""


@dataclass(frozen=True)
class NoCache:
    """Reads whole canvases in every step."""

    predict: Predictor

    def __call__(self, xt: Int[Tensor, "b L"], at: Int[Tensor, "M"], ask: Query, blocks: Blocks) -> Prediction:
        return self.predict(xt, at, ask)

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        pass


class InHiddenStates(ABC):
    """A reader in two parts: what it reads in a step, and the hidden states that it finds there."""

    model: Denoiser

    def __call__(self, xt: Int[Tensor, "b L"], at: Int[Tensor, "M"], ask: Query, blocks: Blocks) -> Prediction:
        return self.model.answer(self.hidden(xt, at, self.read(xt, blocks)), ask)

    @abstractmethod
    def read(self, xt: Int[Tensor, "b L"], blocks: Blocks) -> Blocks:
        """Which positions of each row are read in this step; asked once in each."""

    @abstractmethod
    def hidden(
        self,
        xt: Int[Tensor, "b L"],
        at: Int[Tensor, "M"],
        read: Blocks,
        estimate: Float[Tensor, "b L D"] | None = None,
    ) -> Float[Tensor, "M D"]:
        """Of the flat positions `at` of `xt`, which lie in what is `read`; `estimate` as in `Denoiser.hidden`."""

    def keep(self, rows: Int[Tensor, "b"]) -> None:  # noqa: B027  (most remember nothing of a row)
        """As `Reader.keep`."""


class UpToBlock(InHiddenStates):
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


class Guided:
    """Classifier-free guidance: `(1 + scale) log p(. | prompt) - scale log p(.)`, the prompt masked in the latter.

    Logits are linear in the hidden states, so these are combined (2207.12598; for masked diffusion 2410.18514).
    """

    def __init__(self, model: Denoiser, scale: float, xt: Int[Tensor, "B L"]) -> None:
        self.model, self.scale = model, scale
        self.is_prompt = xt != model.mask_id

    def __call__(self, xt: Int[Tensor, "b L"], at: Int[Tensor, "M"], ask: Query, blocks: Blocks) -> Prediction:
        without_prompt = xt.masked_fill(self.is_prompt, self.model.mask_id)
        both = self.model.hidden(torch.cat([xt, without_prompt]), torch.cat([at, at + xt.numel()]))
        conditional, unconditional = both.chunk(2)
        return self.model.answer((1 + self.scale) * conditional - self.scale * unconditional, ask)

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        self.is_prompt = self.is_prompt[rows]


@runtime_checkable
class Window(Protocol):
    """Which positions of each row are read in a step; what a cache knows of the others stays."""

    def __call__(self, blocks: Blocks) -> Blocks: ...

    def keep(self, rows: Int[Tensor, "b"]) -> None: ...


class BlockWindow:
    """Of a block model: the block that is being decoded, and once what was finished before it. Exact."""

    def __init__(self, xt: Int[Tensor, "B L"]) -> None:
        self.known = torch.zeros(len(xt), dtype=torch.long, device=xt.device)

    def __call__(self, blocks: Blocks) -> Blocks:
        start, self.known = self.known, blocks.start
        return Blocks(start, blocks.stop)

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        self.known = self.known[rows]


class CausalWindow:
    """Causal models: all prompts in the first step, padded to the longest; then one position a step. Exact.

    A causal model predicts position i from what is before it, so that a window `start .. stop` is read at
    `start - 1 .. stop - 2`. What the first pass reads behind a shorter prompt is seen by nobody before it is replaced.

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
    """The whole canvas at the start of every block and, with `every`, after so many steps; else part of it."""

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
    """Prefix cache: the block that is being decoded, and all that follows."""

    def _part(self, blocks: Blocks) -> Blocks:
        return Blocks(blocks.start, torch.full_like(blocks.stop, self.length))


class DualWindow(_Refreshed):
    """Dual cache: the block that is being decoded; what precedes and what follows it is remembered."""

    def _part(self, blocks: Blocks) -> Blocks:
        return blocks


class Cached(InHiddenStates):
    """Reads a window of each row, and remembers keys and values of the rest."""

    def __init__(self, model: Denoiser, window: Window, xt: Int[Tensor, "B L"]) -> None:
        self.model, self.window = model, window
        self.cache = KeyValueCache(xt.shape[1], num_rows=len(xt))

    def read(self, xt: Int[Tensor, "b L"], blocks: Blocks) -> Blocks:
        return self.window(blocks)

    def hidden(
        self,
        xt: Int[Tensor, "b L"],
        at: Int[Tensor, "M"],
        read: Blocks,
        estimate: Float[Tensor, "b L D"] | None = None,
    ) -> Float[Tensor, "M D"]:
        width = read.stop - read.start
        widths = width.unique().tolist() if read.width is None else [read.width]
        if len(widths) == 1:
            return self.model.hidden_within(
                xt, at, start=read.start, width=widths[0], cache=self.cache, estimate=estimate
            )
        row = at // xt.shape[1]
        parts: list[Float[Tensor, "m D"]] = []
        places: list[Int[Tensor, "m"]] = []
        for each in widths:  # rows that read equally much, together
            rows = (width == each).nonzero().squeeze(1)
            place = (width[row] == each).nonzero().squeeze(1)
            own = torch.searchsorted(rows, row[place]) * xt.shape[1] + at[place] % xt.shape[1]
            part = self.model.hidden_within(
                xt[rows],
                own,
                start=read.start[rows],
                width=each,
                cache=self.cache,
                rows=rows,
                estimate=None if estimate is None else estimate[rows],
            )
            parts.append(part)
            places.append(place)
        return torch.cat(parts)[torch.cat(places).argsort()]

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        self.cache.keep(rows)
        self.window.keep(rows)


class SelfConditioned:
    """Tells the model of `states` what it last expected of every masked position that it reads.

    In the first step that is nothing. Of a block model the positions are those of the block that is being decoded; with
    a cache those of the window, and what was expected of the others stays. A pass serves the answer and the estimate,
    so there are as many passes as without.
    """

    def __init__(self, states: InHiddenStates, xt: Int[Tensor, "B L"]) -> None:
        self.states, self.model = states, states.model
        self.estimate = self.model.nothing_expected(xt)

    def __call__(self, xt: Int[Tensor, "b L"], at: Int[Tensor, "M"], ask: Query, blocks: Blocks) -> Prediction:
        is_masked = xt == self.model.mask_id
        read = self.states.read(xt, blocks)
        position = torch.arange(xt.shape[1], device=xt.device)
        is_guessed = is_masked & (position >= read.start.unsqueeze(1)) & (position < read.stop.unsqueeze(1))
        where = is_guessed.flatten().index_fill(0, at, True).nonzero().squeeze(1)
        self._forget(~is_masked)  # has since been revealed
        hidden = self.states.hidden(xt, where, read, self.estimate)
        self._forget(is_guessed)
        self.estimate = self.estimate + scatter_to_canvas(self.model.expected(hidden, ask.forbidden), where, is_guessed)
        return self.model.answer(hidden.index_select(0, torch.searchsorted(where, at)), ask)

    def _forget(self, where: Bool[Tensor, "b L"]) -> None:
        self.estimate = self.estimate.masked_fill(where.unsqueeze(-1), 0.0)

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        self.estimate = self.estimate[rows]
        self.states.keep(rows)
