"""Loops: a range of layers that one pass runs several times (LoopMDM, 2605.26106): deeper, with the same weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator
from torch import nn

from unmask import noise
from unmask.config.settings import OneIsBoth, Section, check_section
from unmask.noise import Purpose

_Layer = Annotated[int, Field(ge=0)]
_Times = Annotated[int, Field(ge=1, le=1000)]


class LoopsConfig(Section):
    """The settings of a section `model.loops`."""

    layers: tuple[_Layer, _Layer] = Field(description="first and last layer of the range, counted from 0")
    times: Annotated[tuple[_Times, _Times], OneIsBoth] = Field(
        description="how often it is run: a number, or [low, high]: drawn for each training step; high outside training"
    )

    @model_validator(mode="after")
    def _check(self) -> "LoopsConfig":
        for key, (low, high) in (("layers", self.layers), ("times", self.times)):
            if low > high:
                raise ValueError(f"{key}=[{low}, {high}]: give the smaller one first")
        return self

    def check(self, num_layers: int) -> None:
        """Raises a `ValueError` if the model has no such layers."""
        if self.layers[1] >= num_layers:
            raise ValueError(
                f"model.loops.layers={[*self.layers]}: model.num_layers={num_layers} layers are 0 to {num_layers - 1}"
            )

    def count(self, num_layers: int, times: int | None = None) -> int:
        """Returns the length of `order`."""
        first, last = self.layers
        return num_layers + (last - first + 1) * ((self.times[1] if times is None else times) - 1)

    def order(self, num_layers: int, times: int | None = None) -> list[int]:
        """Returns the layers in the order in which a pass runs them; default: as often as in training at most."""
        first, last = self.layers
        looped = [*range(first, last + 1)] * (self.times[1] if times is None else times)
        return [*range(first), *looped, *range(last + 1, num_layers)]


Loops = Annotated[LoopsConfig, BeforeValidator(lambda given: check_section(LoopsConfig, given, "model.loops"))]
"""The section as a field of a model's settings."""


def in_order(blocks: Sequence[Any] | nn.ModuleList, loops: LoopsConfig | None, times: int | None) -> list[Any]:
    """Returns the blocks of a network in the order in which a pass runs them."""
    return [blocks[number] for number in (loops.order(len(blocks), times) if loops else range(len(blocks)))]


def is_drawn(backbone: Any) -> bool:
    """True if training runs the loops of `backbone` sometimes more often, sometimes less."""
    loops = loops_of(backbone)
    return loops is not None and loops.times[0] < loops.times[1]


def loops_of(backbone: Any) -> LoopsConfig | None:
    """Returns the loops of a network; None if it has none, as one of the user's own."""
    loops = getattr(getattr(backbone, "config", None), "loops", None)
    return loops if isinstance(loops, LoopsConfig) else None


def draw(backbone: Any, seed: int, step: int | None) -> int | None:
    """Draws how often this training step runs the loops, the same on all processes; None: as always."""
    loops = loops_of(backbone)
    if loops is None or step is None or not is_drawn(backbone):
        return None
    low, high = loops.times
    return low + noise.integer(seed, Purpose.LOOPS, step) % (high - low + 1)


def depth(backbone: Any, times: int | None) -> float:
    """Returns how many layers a pass runs, as a multiple of those that the network has."""
    loops = loops_of(backbone)
    return 1.0 if loops is None else loops.count(len(backbone.blocks), times) / len(backbone.blocks)


@contextmanager
def repeated(backbone: Any, times: int | None) -> Iterator[None]:
    """Runs the loops of `backbone` this often inside the context; None changes nothing."""
    if times is None:
        yield
        return
    before, backbone.times = backbone.times, times
    try:
        yield
    finally:
        backbone.times = before
