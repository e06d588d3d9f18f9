"""A trained model, ready to decode: what `decode` and `chat` start from.

Dimensions: b rows, L positions.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from rich.live import Live
from torch import Tensor, device

from unmask.cli import options
from unmask.decoding.build import AnyDecoder, build_decoder, in_any_order
from unmask.decoding.config import DecodeConfig, check_guidance
from unmask.decoding.decoder import Decoder
from unmask.decoding.trace import trace
from unmask.models.denoiser import Denoiser
from unmask.models.precision import autocast, parameter_dtype, resolve_dtype
from unmask.progress import console
from unmask.tasks.task import Task, build_task
from unmask.training import loading
from unmask.training.trainer import resolve_device
from unmask.types import Decoded

_SECONDS_PER_FRAME = 0.12
_MOST_SECONDS = 12.0


class Opened:
    """A run or an export; its model is built when the first engine is asked for."""

    def __init__(self, run: str, *, weights: str | None, step: str, device: str | None) -> None:
        self.source = loading.read(run, weights=options.check_weights(weights), step=step)
        self.task = build_task(self.source.config)
        self.device = resolve_device(device or self.source.config.train.device)
        self._model: Denoiser | None = None

    def decoder(self, text: str | None, base: DecodeConfig | None = None, option: str = "--decoder") -> DecodeConfig:
        """The settings `text`, over `base`, the run's own unless given."""
        base = base or self.source.config.decode
        config = base if text is None else options.parse_decoder(text, base, option)
        check_guidance(config, self.source.config.data)
        return config

    def engine(self, config: DecodeConfig) -> "Engine":
        """Changes nothing of former engines where the model cannot do what is asked (`UserError`)."""
        model = self._model = self._model or self.source.model()
        decoder = build_decoder(config, model, self.source.tokens)
        dtype = resolve_dtype(config.dtype or self.source.config.train.dtype, self.device)
        model.to(self.device, parameter_dtype(dtype))
        if config.compile:
            model.compile_decoding()
        return Engine(decoder, in_any_order(config, model, self.source.tokens), self.task, dtype, self.device)


@dataclass(frozen=True)
class Finished:
    tokens: Int[Tensor, "L"]
    nfe: int
    steps: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Engine:
    decoder: AnyDecoder
    open_decoder: Decoder
    """Of the same tokens, but that it can be listened to (`report/replay.py`)."""
    task: Task
    dtype: str
    device: device

    def steps(self, canvases: Int[Tensor, "b L"], keys: Int[Tensor, "b"]) -> Iterator[Decoded]:
        with autocast(self.dtype, self.device):
            yield from self.decoder.steps(canvases.to(self.device), keys.to(self.device))

    def finish(
        self, canvases: Int[Tensor, "b L"], keys: Int[Tensor, "b"], update: Callable[[int], None]
    ) -> list[Finished]:
        """`update` is told how many positions are filled in."""
        for state in self.steps(canvases, keys):
            update(int((state.reveal_step >= 0).sum()))
        return [Finished(*row) for row in zip(state.tokens.cpu(), state.nfe.tolist(), strict=True)]

    def trace(
        self, canvases: Int[Tensor, "b L"], keys: Int[Tensor, "b"], update: Callable[[int], None]
    ) -> list[Finished]:
        """As `finish`, with every step."""
        with autocast(self.dtype, self.device):
            tokens, steps = trace(self.open_decoder, canvases.to(self.device), keys.to(self.device))
        update(int((canvases == self.decoder.mask_id).sum()))
        return [Finished(own, len(each), each) for own, each in zip(tokens, steps, strict=True)]

    def watch(
        self, canvas: Int[Tensor, "1 L"], key: Int[Tensor, "1"], *, is_shown: bool = True
    ) -> tuple[Decoded, float]:
        """One canvas, filling in step by step in the terminal; the seconds are without those for looking at it."""
        is_given = canvas[0] != self.decoder.mask_id
        pause = min(_SECONDS_PER_FRAME, _MOST_SECONDS / max(1, int((~is_given).sum()))) if console.is_terminal else 0
        seconds, last = 0.0, time.perf_counter()
        with Live(console=console, auto_refresh=False) if is_shown else nullcontext() as live:
            for state in self.steps(canvas, key):
                seconds += time.perf_counter() - last
                if live is not None:
                    is_new = (state.reveal_step[0].cpu() == int(state.nfe[0]) - 1) & ~is_given
                    live.update(self.task.render(state.tokens[0].cpu(), is_given, is_new), refresh=True)
                    time.sleep(pause)
                last = time.perf_counter()
        return state, seconds
