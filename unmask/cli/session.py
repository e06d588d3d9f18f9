"""Decoding prompts with a loaded run, for the verbs `decode` and `chat`.

Dimensions: b rows, L positions.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from rich.live import Live
from torch import Tensor

from unmask.decoding.config import DecodeConfig
from unmask.decoding.trace import trace
from unmask.errors import UserError
from unmask.models.precision import casts_kept
from unmask.progress import console
from unmask.training.loading import LoadedRun
from unmask.types import Decoded

_SECONDS_PER_FRAME = 0.12
_MOST_SECONDS = 12.0


@dataclass(frozen=True)
class Answer:
    """A finished canvas."""

    tokens: Int[Tensor, "L"]
    nfe: int
    steps: list[dict[str, Any]] | None = None
    """Every step (`decoding.trace.trace`), if it was traced."""


class DecodeSession:
    """A run and one of its decoders.

    Args:
        run: the run.
        settings: of the decoder.
        rows: canvases that will be decoded.

    Raises:
        UserError: the model cannot decode as `settings` say. Other sessions of the run go on as they were.
    """

    def __init__(self, run: LoadedRun, settings: DecodeConfig, *, rows: int = 1) -> None:
        self.run = run
        self.settings = settings
        self.decoder = run.decoder(settings, rows=rows)

    def check(self, canvas: Int[Tensor, "1 L"]) -> None:
        """Checks, before any work, that the canvas can be filled in.

        Raises:
            UserError: it cannot.
        """
        next(self.decoder.steps(canvas))
        if self.run.model.alignment == "next" and int(canvas[0, 0]) == self.decoder.mask_id:
            raise UserError(
                "its first position is to be filled in, but this model predicts each from what is before it "
                "(model.alignment=next); begin with something that is given"
            )

    def steps(self, canvases: Int[Tensor, "b L"], keys: Int[Tensor, "b"]) -> Iterator[Decoded]:
        """Yields the state of the canvases after each step; `keys` key each row's noise."""
        device = self.run.device
        yield from self.decoder.steps(canvases.to(device), keys.to(device))

    def decode(
        self, canvases: Int[Tensor, "b L"], keys: Int[Tensor, "b"], update: Callable[[int], None]
    ) -> list[Answer]:
        """Fills in the canvases; calls `update` with the number of positions that are filled in so far."""
        with casts_kept():
            for state in self.steps(canvases, keys):
                update(int((state.reveal_step >= 0).sum()))
        return [Answer(*row) for row in zip(state.tokens.cpu(), state.nfe.tolist(), strict=True)]

    def trace(
        self, canvases: Int[Tensor, "b L"], keys: Int[Tensor, "b"], update: Callable[[int], None]
    ) -> list[Answer]:
        """Fills in the canvases as `decode` does, and keeps every step."""
        device = self.run.device
        tokens, steps = trace(self.decoder, canvases.to(device), keys.to(device))
        update(int((canvases == self.decoder.mask_id).sum()))
        return [Answer(own, len(each), each) for own, each in zip(tokens, steps, strict=True)]

    def watch(
        self, canvas: Int[Tensor, "1 L"], key: Int[Tensor, "1"], *, is_shown: bool = True
    ) -> tuple[Decoded, float]:
        """Fills in one canvas, step by step in the terminal; returns it and the seconds that decoding took."""
        is_given = canvas[0] != self.decoder.mask_id
        pause = min(_SECONDS_PER_FRAME, _MOST_SECONDS / max(1, int((~is_given).sum()))) if console.is_terminal else 0
        seconds, last = 0.0, time.perf_counter()
        with casts_kept(), Live(console=console, auto_refresh=False) if is_shown else nullcontext() as live:
            for state in self.steps(canvas, key):
                seconds += time.perf_counter() - last
                if live is not None:
                    is_new = (state.reveal_step[0].cpu() == int(state.nfe[0]) - 1) & ~is_given
                    live.update(self.run.task.render(state.tokens[0].cpu(), is_given, is_new), refresh=True)
                    time.sleep(pause)
                last = time.perf_counter()  # without the time for looking at it
        return state, seconds
