"""One masking process for the first steps of a run, another for the rest."""

from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Int
from pydantic import Field, SerializeAsAny, field_validator
from torch import Tensor

from unmask.data.stream import ExampleStream
from unmask.errors import UserError
from unmask.masking.process import MaskingProcess, ProcessContext, Requirements
from unmask.registry import resolve
from unmask.section import Section, check_section, name_of
from unmask.types import CleanBatch, MaskedBatch, TokenStats


@dataclass(frozen=True)
class ShiftedStream:
    """The examples of `stream` from number `start` on."""

    stream: ExampleStream
    start: int

    def __getitem__(self, number: Int[Tensor, "n"]) -> CleanBatch:
        return self.stream[number + self.start]


class InTurn:
    """`first` for `switch_at` steps, then `then`, whose examples come after all that `first` might have drawn.

    For a method that needs a model which knows something already, as PUMA does: its first confidences mean nothing.
    Until they do, every step on uniform masks takes new examples, where the pool would keep old ones and reveal them in
    an order that is no better than chance.
    """

    class Config(Section):
        name: str = "in_turn"
        switch_at: int = Field(ge=1, description="steps of `first`")
        first: SerializeAsAny[Section] = Field(description="settings of a process, with its name")
        then: SerializeAsAny[Section] = Field(description="settings of a process, with its name")

        @field_validator("first", "then", mode="before")
        @classmethod
        def _check_process(cls, value: Any, info: Any) -> Any:
            if isinstance(value, Section):
                return value
            name = value.get("name", "uniform") if isinstance(value, dict) else "uniform"
            return check_section(resolve("process", str(name)).Config, value, f"process.{info.field_name}")

        @property
        def block_size(self) -> int | None:
            """Of both: `_joint` refuses two sizes."""
            return getattr(self.first, "block_size", None)

    def __init__(self, first: MaskingProcess, then: MaskingProcess, switch_at: int, batch_size: int) -> None:
        self.first, self.then, self.switch_at = first, then, switch_at
        self.batch_size = batch_size
        self.requirements = _joint(first.requirements, then.requirements)
        self.step = 0

    @classmethod
    def from_config(cls, config: Config, context: ProcessContext) -> "InTurn":
        first, then = (
            resolve("process", name_of(part)).from_config(part, context) for part in (config.first, config.then)
        )
        return cls(first, then, config.switch_at, context.shard.total)

    @property
    def active(self) -> MaskingProcess:
        return self.first if self.step < self.switch_at else self.then

    @property
    def examples_seen(self) -> int:
        return self.first.examples_seen + self.then.examples_seen

    def next_batch(self, stream: ExampleStream) -> MaskedBatch:
        # No process takes more than a batch of new examples a step, whichever rows are whose.
        start = 0 if self.active is self.first else self.switch_at * self.batch_size
        return self.active.next_batch(ShiftedStream(stream, start))

    def observe(self, batch: MaskedBatch, stats: TokenStats) -> None:
        self.active.observe(batch, stats)
        self.step += 1

    def metrics(self) -> dict[str, float]:
        return self.active.metrics()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "first": self.first.state_dict(), "then": self.then.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.first.load_state_dict(state["first"])
        self.then.load_state_dict(state["then"])

    def restarted(self, state: dict[str, Any]) -> dict[str, Any]:
        """As `Pool.restarted`, of the parts that have a pool."""
        parts = {"first": self.first, "then": self.then}
        return state | {name: part.restarted(state[name]) for name, part in parts.items() if hasattr(part, "restarted")}


def _joint(first: Requirements, then: Requirements) -> Requirements:
    """What one model must be to serve both.

    Raises:
        UserError: no model can.
    """
    if first.block_size != then.block_size:
        raise UserError(
            f"process.first.block_size={first.block_size} and process.then.block_size={then.block_size}: both train "
            "one model; make them equal"
        )
    if first.is_causal != then.is_causal:
        raise UserError("one of process.first and process.then trains a causal model, the other does not; use one kind")
    confidences = {part.confidence for part in (first, then)} - {None}
    if len(confidences) > 1:
        raise UserError("process.first and process.then ask the model for different confidences; make them one")
    return replace(first, confidence=confidences.pop() if confidences else None)
