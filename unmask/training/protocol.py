"""The protocol of an evaluation: all that its figures depend on, so that others can repeat it."""

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from unmask import formats
from unmask.config.settings import Section, check_section, flatten
from unmask.errors import UserError
from unmask.models.denoiser import Denoiser
from unmask.training.loading import LoadedRun

_FIGURES = ("nelbo", "accuracy", "shares", "nfe", "zero_shot")
_MAY_MOVE = ("run", "data", "step", "weights", "device", "against")


class EvalOptions(Section):
    """The options of `unmask eval` that its figures depend on; None: not given."""

    run: str
    data: Path | None = None
    task: str | None = None
    decoder: tuple[str, ...] = ()
    examples: int | None = Field(None, ge=1)
    corpus: tuple[Path, ...] = ()
    generative: str | None = None
    samples: int | None = Field(None, ge=1, le=1_000_000)
    prompts: str | None = None
    draws: int | None = Field(None, ge=2, le=4096)
    against: str | None = None
    weights: str | None = None
    step: str = "last"
    device: str | None = None


def describe(loaded: LoadedRun, model: Denoiser, options: EvalOptions, own: dict[str, Any]) -> dict[str, Any]:
    """Returns the protocol of an evaluation.

    Args:
        loaded: the run.
        model: its model, as it computed.
        options: what the command was given.
        own: what the kind of evaluation adds: task, data, decoders and more.
    """
    exact = {} if loaded.checkpoint is None else {"step": str(loaded.step), "weights": loaded.weights}
    return {
        "run": options.run,
        **describe_model(loaded, model),
        **own,
        "options": options.model_copy(update=exact).model_dump(mode="json", exclude_defaults=True),
    }


def describe_model(loaded: LoadedRun, model: Denoiser) -> dict[str, Any]:
    """Returns the part of a protocol that is about the model, and what it was computed with."""
    tokens = loaded.tokens
    return {
        "step": loaded.step,
        "weights": loaded.weights,
        "weights_sha256": loaded.digest(),
        "model": {
            "length": tokens.length,
            "vocab_size": tokens.vocab_size,
            "mask_id": tokens.mask_id,
            "eos_id": tokens.eos_id,
            "tokens": tokens.fingerprint,
            "block_size": model.block_size,
            "causal": model.is_causal,
            "alignment": model.alignment,
        },
        "dtype": model.compute_dtype,
        "device": loaded.device.type,
        "versions": {"unmask": metadata.version("unmask"), "torch": torch.__version__},
    }


@dataclass(frozen=True)
class Repeated:
    """An earlier evaluation, which is repeated."""

    file: Path
    protocol: dict[str, Any]
    options: EvalOptions
    result: dict[str, Any]
    """What `unmask eval --json` printed then, but for the protocol; empty if the file holds the protocol alone."""

    @staticmethod
    def read(file: Path) -> "Repeated":
        """Reads what `unmask eval --json` wrote, or the `protocol` of it.

        Raises:
            UserError: it is something else, or was written before protocols listed the options.
        """
        found = formats.read_json(file)
        protocol = found.get("protocol", found) if isinstance(found, dict) else None
        if not isinstance(protocol, dict) or "weights_sha256" not in protocol:
            raise UserError(f"{file}: is no protocol; give what `unmask eval --json` wrote")
        result = {key: value for key, value in found.items() if key != "protocol"} if "protocol" in found else {}
        options = check_section(EvalOptions, protocol.get("options"), f"{file}: options")
        return Repeated(file, protocol, options, result)

    def with_places(self, given: EvalOptions) -> EvalOptions:
        """Returns its options, with what lies elsewhere now as `given`.

        Raises:
            UserError: another option is given too.
        """
        names = given.model_dump(exclude_defaults=True, exclude={"run"} if not given.run else None)
        if wrong := sorted(names.keys() - {*_MAY_MOVE}):
            options = ", ".join(f"--{name}" for name in wrong)
            raise UserError(f"{options}: {self.file} says how it is evaluated; leave it out, or leave --protocol out")
        return self.options.model_copy(update={name: getattr(given, name) for name in names})

    def differences(self, protocol: dict[str, Any]) -> dict[str, list[Any]]:
        """Returns what is not as it was, by key: the value then, and the one of `protocol`."""
        old, new = (
            dict(flatten({key: value for key, value in each.items() if key not in ("options", "run")}))
            for each in (self.protocol, protocol)
        )
        return {key: [old.get(key), new.get(key)] for key in sorted({*old, *new}) if old.get(key) != new.get(key)}

    def figures(self, result: dict[str, Any]) -> dict[str, list[Any]]:
        """Returns the figures of then and of `result`, by key, as far as both have them."""
        then, now = (
            dict(flatten({key: value for key, value in each.items() if key in _FIGURES}))
            for each in (self.result, result)
        )
        return {key: [then[key], now[key]] for key in then if key in now}
