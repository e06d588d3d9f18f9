"""The protocol of an evaluation: all that its figures depend on, so that others can repeat it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from unmask import formats
from unmask.config.registry import is_kind_of_task
from unmask.config.run import FEWEST_DRAWS, MOST_DRAWS, MOST_SAMPLES, RunConfig
from unmask.config.settings import Section, check_section, flatten
from unmask.data.fingerprint import examples_digest
from unmask.decoding.config import DecodeConfig
from unmask.errors import UserError
from unmask.models.denoiser import Denoiser
from unmask.tasks.task import Task, is_graded
from unmask.training.evaluating import evaluated_weights, rate
from unmask.training.folder import own_version
from unmask.training.loading import LoadedRun, has_checkpoints
from unmask.types import CleanBatch

_FIGURES = ("nelbo", "accuracy", "shares", "nfe", "zero_shot", "multiple_choice")
_MAY_MOVE = ("run", "data", "step", "weights", "device", "against")


class EvalOptions(Section):
    """The options of `unmask eval` that its figures depend on; None: not given."""

    run: str
    data: Path | None = None
    task: str | None = None
    decoder: tuple[str, ...] = ()
    examples: int | None = Field(None, ge=1)
    corpus: tuple[Path, ...] = ()
    questions: tuple[Path, ...] = ()
    generative: str | None = None
    samples: int | None = Field(None, ge=1, le=MOST_SAMPLES)
    prompts: str | None = None
    draws: int | None = Field(None, ge=FEWEST_DRAWS, le=MOST_DRAWS)
    against: str | None = None
    weights: str | None = None
    step: str = "last"
    device: str | None = None


def describe(
    loaded: LoadedRun,
    model: Denoiser,
    options: EvalOptions,
    own: dict[str, Any],
    repeated: "Repeated | None" = None,
) -> dict[str, Any]:
    """Returns the protocol of an evaluation.

    Args:
        loaded: the run.
        model: its model, as it computed.
        options: what the command was given.
        own: what the kind of evaluation adds: task, data, decoders and more.
        repeated: the evaluation that it repeats: weights have a digest of the same kind.
    """
    exact = {} if loaded.checkpoint is None else {"step": str(loaded.step), "weights": loaded.weights}
    return {
        "run": options.run,
        **describe_model(loaded, model, None if repeated is None else str(repeated.protocol["weights_sha256"])),
        **own,
        "options": options.model_copy(update=exact).model_dump(mode="json", exclude_defaults=True),
    }


def describe_model(loaded: LoadedRun, model: Denoiser, digest: str | None = None) -> dict[str, Any]:
    """Returns the part of a protocol that is about the model, and what it was computed with.

    `digest` is one of its weights to compare with (`training/digest.py`).
    """
    tokens = loaded.tokens
    return {
        "step": loaded.step,
        "weights": loaded.weights,
        "weights_sha256": loaded.weights_digest(digest),
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
        "versions": {"unmask": own_version(), "torch": torch.__version__},
    }


def describe_examples(
    config: RunConfig, task: Task, examples: CleanBatch, decoders: Sequence[DecodeConfig], *, is_causal: bool
) -> dict[str, Any]:
    """Returns the part of a protocol that is about what was evaluated: examples, masks and decoders."""
    extent, likelihood = getattr(task, "extent", None), "none: the answers are not known as tokens"
    is_known = examples.is_known(task.tokens.mask_id)
    if is_known and is_causal:
        likelihood = "exact NLL of a causal model; nats per maskable token"
    elif is_known:
        likelihood = f"uniform masks, {config.eval.nelbo_draws} per example; nats per maskable token"
    return {
        "data_sha256": examples_digest(examples),
        "examples": len(examples),
        "nelbo": likelihood,
        **({"rows": extent(examples).rows} if is_known and extent is not None else {}),
        "decoders": {decoder.label: decoder.model_dump(mode="json") for decoder in decoders},
    }


def result_of_training(loaded: LoadedRun, environment: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Returns a run's own evaluation at the checkpoint that was opened, as `unmask eval RUN --json` gives it.

    Samples under another model are left out: `unmask eval` measures them apart.

    Args:
        loaded: the run.
        environment: its `environment.json`, which says where and with what it was evaluated.
        row: its line of metrics at that step; without figures if it was not evaluated there.
    """
    config, task = loaded.config, loaded.task
    settings, decoders = config.eval, config.eval.decoders(config.decode) if is_graded(config) else []
    examples = loaded.held_out(settings.examples)
    own = describe_examples(config, task, examples, decoders, is_causal=loaded.model.is_causal)
    own |= {"task": config.task.name, "data": "validation"}
    # Files that a run names are not opened here: it may be a stranger's. What they were, it says itself.
    about_text = environment.get("evaluates")
    own |= about_text if isinstance(about_text, dict) else {}
    asked = EvalOptions(run=str(loaded.path))
    if settings.zero_shot or settings.multiple_choice:
        files = {"corpus": settings.zero_shot, "questions": settings.multiple_choice}
        asked = check_section(EvalOptions, {"run": asked.run, "examples": settings.examples} | files, "eval")
    said = describe(loaded, loaded.model, asked, own)
    device, torch_version = environment.get("device"), environment.get("torch")
    said["dtype"] = environment.get("dtype")
    said["device"] = device if device in ("cpu", "mps", None) else "cuda"  # of a GPU, its name is kept
    said["versions"] = {"unmask": environment.get("unmask"), "torch": torch_version}
    return _figures_of(loaded, decoders, row) | {"protocol": said}


def _figures_of(loaded: LoadedRun, decoders: Sequence[DecodeConfig], row: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of a line of metrics as `Evaluation.as_dict` nests them."""
    found: dict[str, Any] = {
        "nelbo": row.get(f"eval/nelbo/{loaded.weights}"),
        "accuracy": {decoder.label: row.get(rate(loaded.weights, decoder.label)) for decoder in decoders},
    }
    if loaded.weights == evaluated_weights(loaded.config)[0]:  # text is measured with the first weights alone
        for kind in ("zero_shot", "multiple_choice"):
            for key, value in row.items():
                if key.startswith(prefix := f"eval/{kind}/"):
                    name, _, figure = key.removeprefix(prefix).rpartition("/")
                    found.setdefault(kind, {}).setdefault(name, {})[figure] = value
    found["accuracy"] = {label: value for label, value in found["accuracy"].items() if value is not None}
    return {key: value for key, value in found.items() if value not in (None, {})}


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
        """Returns its options, with what lies elsewhere now as `given`; step and weights are chosen of a run alone.

        Raises:
            UserError: another option is given too.
        """
        names = given.model_dump(exclude_defaults=True, exclude={"run"} if not given.run else None)
        if wrong := sorted(names.keys() - {*_MAY_MOVE}):
            options = ", ".join(f"--{name}" for name in wrong)
            raise UserError(f"{options}: {self.file} says how it is evaluated; leave it out, or leave --protocol out")
        own = {} if not given.run or has_checkpoints(given.run) else {"weights": None, "step": "last"}
        return self.options.model_copy(update=own | {name: getattr(given, name) for name in names})

    def check_task(self, task: str) -> None:
        """Raises `UserError` unless it is an evaluation of `task`, or of one that reads examples alike."""
        then = str(self.protocol.get("task", task))
        if not is_kind_of_task(then, task) and not is_kind_of_task(task, then):
            raise UserError(
                f"--protocol {self.file}: is of the task {then}, and this model is for {task}; give a model for {then}"
            )

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
