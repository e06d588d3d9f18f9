"""The state that a checkpoint holds: its counters, its tensors by name, and checks before any of it is loaded.

A checkpoint may come from anybody, and a tensor of another shape or format can be written beyond the end of a buffer.
"""

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from unmask import formats
from unmask.errors import NotFinite, UserError
from unmask.training.parallel import LazyTensor, TensorShard

SEPARATOR = "/"
"""Between the keys in the name of a saved tensor."""
_FLOATS = (torch.float32, torch.float64, torch.bfloat16)
_NOT_NEGATIVE = ("exp_avg_sq", "step")
_DAMAGED = "it is damaged, or was altered: take another checkpoint"

Count = Annotated[int, Field(ge=0, le=2**53)]
"""A number of steps, examples or bytes."""
_Number = Annotated[float, Field(allow_inf_nan=False)]
_OnlyTensors = Annotated[dict[str, Any], Field(max_length=0)]


@dataclass
class Progress:
    """A run's counters and best evaluation, saved beside the trainer's state."""

    step: Count = 0
    seconds: Annotated[_Number, Field(ge=0)] = 0.0
    """Seconds spent in training steps, the device's work included, without evaluation, saving and compilation."""
    passes: Annotated[_Number, Field(ge=0)] | None = None
    """Forward passes of training (`Denoiser.count_passes`); None if the run began before they were counted."""
    metrics_position: Count = 0
    """Length of `metrics.jsonl` in bytes."""
    skips: Count = 0
    """Number of steps whose update was skipped, because loss or gradient was not finite."""
    evaluated_step: Count = 0
    """Last step that was evaluated; if an evaluation was due since, the resumed run makes it first."""
    best_step: Count | None = None
    best_score: _Number = -math.inf
    best_nelbo: _Number = math.inf

    def count_step(self, passes: float) -> None:
        """Counts a step, of so many passes."""
        self.step += 1
        if self.passes is not None:
            self.passes += passes

    @contextmanager
    def count_seconds(self) -> Iterator[None]:
        """Counts the time within as training."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    def spent(self, examples_seen: int) -> dict[str, Any]:
        """Returns the first keys of every line of `metrics.jsonl`: how far the run has come."""
        passes = {} if self.passes is None else {"passes": self.passes}
        return {"step": self.step, "seconds": self.seconds, "examples_seen": examples_seen} | passes

    def is_better(self, score: float, nelbo: float) -> bool:
        """True if this evaluation is the best so far: by accuracy, and at equal accuracy (0, early on) by NELBO."""
        return (score, -nelbo) > (self.best_score, -self.best_nelbo)

    @staticmethod
    def read(saved: Any, where: str) -> "Progress":
        """Reads a saved `progress`; fields that are newer than it have their defaults.

        Raises:
            UserError: a field is of another type, or out of range; names it.
        """
        if isinstance(saved, dict):  # JSON has no infinity: without an evaluation the best ones are null
            saved = {key: value for key, value in saved.items() if value is not None or not key.startswith("best_")}
        found: Progress = formats.checked({"progress": saved}, dict[str, Progress], where)["progress"]
        for name in ("evaluated_step", "best_step", "skips"):
            if (getattr(found, name) or 0) > found.step:
                raise UserError(f"{where}: progress.{name}={getattr(found, name)}: is after its step {found.step}")
        return found


class _Trainer(BaseModel):
    model_config = ConfigDict(extra="allow")

    step_number: Count
    dropout_rng: None = None


class _Average(BaseModel):
    num_updates: Count
    shadow: _OnlyTensors


class _State(BaseModel):
    """The content of `state.json`: everything but the tensors."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: _OnlyTensors
    optimizer: dict[str, _OnlyTensors]
    ema: _Average | None
    process: dict[str, Any]
    trainer: _Trainer
    progress: dict[str, Any] = Field(default_factory=dict)


def split(state: dict[str, Any], prefix: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a state into its tensors, by path, and the tree of everything else."""
    tensors: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            tensors[prefix + key] = value.detach()
        elif isinstance(value, TensorShard | LazyTensor):
            tensors[prefix + key] = value
        elif isinstance(value, dict):
            inner, rest[key] = split(value, f"{prefix}{key}{SEPARATOR}")
            tensors |= inner
        else:
            rest[key] = value
    return tensors, rest


def join(tensors: Mapping[str, Tensor | LazyTensor], rest: dict[str, Any], where: str) -> dict[str, Any]:
    """Undoes `split`, in place of `rest`.

    Raises:
        UserError: a tensor has no place there, or that of something else.
    """
    for name, tensor in tensors.items():
        *path, last = name.split(SEPARATOR)
        place: Any = rest
        for key in path:
            place = place.get(key) if isinstance(place, dict) else None
        if not path or not isinstance(place, dict) or last in place:
            raise UserError(f"{where}: {'.'.join(path) or 'the whole'}: has no place for the saved tensor {last!r}")
        place[last] = tensor
    return rest


def progress_of(state: dict[str, Any], where: str, step: int) -> Progress:
    """Reads the counters of a state that was saved at `step`.

    Raises:
        UserError: a field is of another type or out of range, or they are of other steps.
    """
    formats.checked(split(state)[1], _State, where)
    progress = Progress.read(state.get("progress"), where)
    counted = {"progress.step": progress.step, "trainer.step_number": state["trainer"]["step_number"]}
    counted |= {"process.step": state["process"]["step"]} if "step" in state["process"] else {}
    for name, value in counted.items():
        if type(value) is not int or value != step:
            raise UserError(f"{where}: {name}={str(value)[:40]}: its checkpoint is of step {step}; {_DAMAGED}")
    return progress


def check(
    state: dict[str, Any],
    where: str,
    *,
    own: Mapping[str, Tensor],
    moments: Mapping[str, Mapping[str, Tensor]],
    averaged: Collection[str] | None,
) -> None:
    """Checks names, shapes, formats and values of everything in `state` that is there for each parameter.

    Args:
        state: its sections may hold `LazyTensor`s, of which the heads alone are read.
        where: names the checkpoint in errors.
        own: the model's state.
        moments: what the optimizer keeps for each parameter, as tensors of these shapes and formats.
        averaged: all names of its parameters, if the run keeps an average of them, else None.

    Raises:
        UserError: something differs, or is not finite; names it.
    """
    formats.checked(split(state)[1], _State, where)
    if (averaged is None) != (state["ema"] is None):
        has, wants = ("an", "none") if averaged is None else ("no", "one")
        raise UserError(f"{where}: ema: it holds {has} average of the weights, this run has {wants}; {_DAMAGED}")
    check_tensors(own, state["model"], f"{where}, model", finite=averaged or moments)
    if averaged is not None:
        check_tensors({name: own[name] for name in averaged}, state["ema"]["shadow"], f"{where}, ema")
    for name, saved in state["optimizer"].items():
        if name not in moments:
            raise UserError(f"{where}, optimizer: {name[:200]} is no parameter of this model; {_DAMAGED}")
        check_tensors(moments[name], saved, f"{where}, optimizer, {name}")


def check_tensors(
    own: Mapping[str, Tensor], saved: Mapping[str, Any], where: str, finite: Collection[str] | None = None
) -> None:
    """Checks that `saved` has the names, shapes and formats of `own`, and that those in `finite` are; default: all.

    Raises:
        UserError: they differ; names the first three.
    """
    if different := differences(own, saved):
        raise UserError(f"{where}: is of another model: {different}; is it this run's?")
    for name, value in saved.items():
        if isinstance(value, Tensor) and (finite is None or name in finite):
            check_values(name, value, where)


def check_values(name: str, value: Tensor, where: str) -> None:
    """Raises `UserError` if `value` holds nan or infinity, or is negative where it must not be."""
    if found := not_finite(value):
        raise UserError(f"{where}: {name} holds {found}; {_DAMAGED}")
    if name in _NOT_NEGATIVE and value.numel() and float(value.min()) < 0:
        raise UserError(f"{where}: {name} holds {float(value.min())}, which is below 0; {_DAMAGED}")


def not_finite(value: Tensor) -> str:
    """Returns `nan` or `infinity` if `value` holds one, else nothing."""
    if not value.is_floating_point() or not value.numel():
        return ""
    least, most = (float(end) for end in torch.aminmax(value.detach()))  # both are nan wherever there is one
    return "nan" if math.isnan(least) else "" if math.isfinite(least) and math.isfinite(most) else "infinity"


def check_trained(state: Mapping[str, Any], parameters: Iterable[tuple[str, Any]], step: int, lr: float) -> None:
    """Checks the weights, their average and the optimizer's moments of a trainer's own `state`, before it is saved.

    Raises:
        NotFinite: one of them is not finite; names it.
    """
    known = {name for name, _ in parameters}  # a buffer may hold infinity
    weights = {name: value for name, value in state["model"].items() if name in known}
    found = {
        "weight": weights,
        "averaged weight": (state["ema"] or {}).get("shadow", {}),
        "optimizer": state["optimizer"],
    }
    for kind, values in found.items():
        for name, value in split(values)[0].items():
            if said := not_finite(value.own if isinstance(value, TensorShard) else value):
                raise NotFinite(
                    f"step {step}: {kind} {name} holds {said}, so this step is not saved; checkpoints of earlier ones "
                    f"stay. Start a new run with an optim.lr below {lr:g}, or a longer optim.warmup_steps"
                )


def check_weights(tensors: Mapping[str, Tensor], averaged: Mapping[str, Tensor], where: str) -> None:
    """Checks weights whose model is not known yet: some are floating-point, and an average fits them.

    Raises:
        UserError: it is not so; names the tensor.
    """
    if not any(value.dtype in _FLOATS for value in tensors.values()):
        raise UserError(f"{where}: holds no weights in float32, float64 or bfloat16")
    known = {name: value for name, value in tensors.items() if name in averaged}
    if different := differences(known, averaged):
        raise UserError(f"{where}: the average is of another model than the weights: {different}; {_DAMAGED}")


def differences(own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Describes the first three tensors whose shapes or formats in `own` and `other` differ; empty if none do."""
    wrong = [name for name in sorted({*own, *other}) if _kind(own, name) != _kind(other, name)]
    return "; ".join(
        f"{name} is {_words(other, name, own)}{_files(other.get(name))}, here {_words(own, name, other)}"
        for name in wrong[:3]
    )


def _files(value: Any) -> str:
    """Names the files of a tensor that is not read yet."""
    return f" (in {' and '.join(value.files()[:4])})" if isinstance(value, LazyTensor) else ""


def _kind(tensors: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    if not isinstance(value := tensors.get(name), Tensor | LazyTensor):
        return ()
    return tuple(value.shape), value.dtype


def _words(tensors: Mapping[str, Any], name: str, beside: Mapping[str, Any]) -> str:
    kind, other = _kind(tensors, name), _kind(beside, name)
    if not kind:
        return "missing"
    return str(kind[0]) if not other or kind[0] != other[0] else str(kind[1])


class _Tokens(BaseModel):
    """A `TokenSpec` in a file."""

    vocab_size: Annotated[int, Field(ge=1, le=2**31)]
    length: Annotated[int, Field(ge=1, le=2**31)]
    mask_id: Annotated[int, Field(ge=0)]
    eos_id: Annotated[int, Field(ge=0)] | None = None
    pad_id: Annotated[int, Field(ge=0)] | None = None
    fingerprint: str | None = None

    @model_validator(mode="after")
    def _check_ids(self) -> "_Tokens":
        for name in ("mask_id", "eos_id", "pad_id"):
            if (getattr(self, name) or 0) >= self.vocab_size:
                raise ValueError(f"{name} is beyond vocab_size={self.vocab_size}")
        return self


class Export(BaseModel):
    """An export's `config.json`."""

    format: Literal["unmask"] = "unmask"
    step: Count
    weights: Literal["ema", "raw"]
    tokens: _Tokens
    run: dict[str, Any]
    data: Any = None
