"""Models from a run or an export, and exports.

Weights to start from: of a run, an export, or a Hugging Face checkpoint.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unmask.config.run import RunConfig
from unmask.config.settings import Section
from unmask.errors import UserError
from unmask.models import hf
from unmask.models.build import build_denoiser
from unmask.models.denoiser import Denoiser
from unmask.models.transformer import Transformer, TransformerConfig
from unmask.progress import warn
from unmask.tasks.task import Task, build_task, keep_files
from unmask.training import checkpoint
from unmask.training.folder import read_config
from unmask.types import TokenSpec


@dataclass(frozen=True)
class Source:
    """What a run or an export holds, as far as decoding and evaluation need it."""

    config: RunConfig
    tokens: TokenSpec
    tensors: dict[str, Tensor]
    weights: str
    """`ema` or `raw`."""
    step: int

    def model(self) -> Denoiser:
        """The denoiser with these weights, in eval mode."""
        model = build_denoiser(self.config.model, self.tokens)
        model.to(next(value.dtype for value in self.tensors.values() if value.is_floating_point()))
        model.load_state_dict(self.tensors)
        return model.eval()


def load(source: str | Path, *, weights: str | None = None, step: str = "last") -> Denoiser:
    """The denoiser of a run or of an export, in eval mode, on the CPU.

    Args:
        source: a folder that `unmask train` or `unmask export` wrote.
        weights: of a run, `ema` or `raw`; unless given, the average where there is one.
        step: of a run, `last`, `best` or a number, as a string.

    Its statistics beside the NLL are of the confidence `prob`, unless `confidence` of the denoiser is set.

    Raises:
        UserError: neither a run with a complete checkpoint nor an export, or weights that it does not have.
    """
    return read(source, weights=weights, step=step).model()


def read(source: str | Path, *, weights: str | None = None, step: str = "last") -> Source:
    """As `load`, with the configuration and without building the model."""
    if weights not in (None, "ema", "raw"):
        raise UserError(f"weights {weights!r}: use ema or raw")
    source = Path(source).expanduser()
    is_export = (source / "model.safetensors").exists()
    return _read_export(source, weights, step) if is_export else _read_run(source, weights, step)


def export(run: str | Path, target: str | Path, *, weights: str | None = None, step: str = "last") -> Source:
    """Writes `target/model.safetensors` and `target/config.json`, all that `load` needs.

    Raises:
        UserError: as `load`, or `target` already holds something.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not an empty folder; name another one")
    source = read(run, weights=weights, step=step)
    description = {
        "format": "unmask",
        "step": source.step,
        "weights": source.weights,
        "tokens": asdict(source.tokens),
        "run": source.config.model_dump(mode="json"),
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        save_file(source.tensors, target / "model.safetensors", metadata={"format": "pt"})
        (target / "config.json").write_text(json.dumps(description, indent=1) + "\n")
        keep_files(build_task(source.config), target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error}") from error
    return source


def _read_run(run: Path, weights: str | None, step: str) -> Source:
    config = read_config(run).of_run(run)
    path = checkpoint.find(run, step, warn)
    tensors, averaged = checkpoint.load_part(path, "model"), checkpoint.load_part(path, "ema/shadow")
    if weights == "ema" and not averaged:
        raise UserError(f"{run}: has no averaged weights (ema.decay=0); use --weights raw")
    weights = weights or ("ema" if averaged else "raw")
    if weights == "ema":
        tensors |= averaged
    return Source(config, build_task(config).tokens, tensors, weights, checkpoint.step_of(path))


def _read_export(source: Path, weights: str | None, step: str) -> Source:
    try:
        description: dict[str, Any] = json.loads((source / "config.json").read_text())
        tokens, tree = TokenSpec(**description["tokens"]), description["run"]
        held = description["weights"], description["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{source / 'config.json'}: not the description of an export: {error!r}") from error
    if weights not in (None, held[0]) or step not in ("last", str(held[1])):
        raise UserError(f"{source}: this export holds the {held[0]} weights of step {held[1]} alone; choose at export")
    try:
        tensors = load_file(source / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{source / 'model.safetensors'}: damaged: {error}; export it again") from error
    return Source(RunConfig.from_tree(tree).of_run(source), tokens, tensors, *held)


def read_initial_weights(source: str, task: Task, settings: Section, model: nn.Module) -> dict[str, Tensor]:
    """The state of `model`, of `settings`, that `source` holds. What is to start at 0 may be missing there.

    Raises:
        UserError: nothing of the kind is there, or it is of another vocabulary or shape; the message says which.
    """
    folder = Path(source).expanduser()
    weights = _of_checkpoint(folder, task, settings) if hf.is_checkpoint(folder) else _of_run(source, task)
    own = model.state_dict()
    weights = {name: own[name] for name in own if name.endswith(Transformer.STARTS_AT_ZERO)} | weights
    if named := checkpoint.differences(own, weights):
        raise UserError(
            f"train.init={source}: its model differs from this one: {named}; set `model` as it has it, or name another"
        )
    return weights


def _of_run(source: str, task: Task) -> dict[str, Tensor]:
    found = read(source)
    if found.tokens.fingerprint != task.tokens.fingerprint:
        raise UserError(
            f"train.init={source}: its ids mean other tokens than those of data.path; prepare the data of both with "
            "the same tokenizer and vocabulary"
        )
    return found.tensors


def _of_checkpoint(folder: Path, task: Task, settings: Section) -> dict[str, Tensor]:
    if not isinstance(settings, TransformerConfig):
        raise UserError(f"train.init={folder}: is for model.name=transformer, not for a model of your own")
    hf.check_settings(folder, settings)
    original_ids = getattr(task, "original_ids", None)
    return hf.read_weights(folder, original_ids=original_ids, vocab_size=task.tokens.vocab_size)
