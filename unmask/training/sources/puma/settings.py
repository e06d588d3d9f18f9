"""Reads the settings of the PUMA paper's code (JaeyeonKim01/PUMA): a YAML file, or what a checkpoint keeps of one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError

from unmask import formats
from unmask.config.settings import flatten
from unmask.errors import UserError

Script = Literal["train.py", "train_block.py"]
STRATEGIES: dict[Script, tuple[str, ...]] = {
    "train.py": ("standard", "progressive", "arm"),
    "train_block.py": ("block", "progressive"),
}
NONE = "none"
"""How it writes that a path is not set."""
_Size = Annotated[int, Field(gt=0, le=2**24)]
_Share = Annotated[float, Field(gt=0, lt=1)]
_CLUES = 81


class _Part(BaseModel):
    """A section; keys that its code does not know are kept aside."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class ModelPart(_Part):
    # Any other key would be another model.
    model_config = ConfigDict(extra="forbid")

    vocab_size: _Size
    hidden_size: _Size
    intermediate_size: _Size
    num_layers: Annotated[int, Field(gt=0, le=10_000)]
    num_attention_heads: _Size
    num_kv_heads: _Size
    max_position: _Size = 1024
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    tie_lm_head: bool = False
    bias_qkv: bool = True
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    causal: bool = False
    arm_init: str | None = None
    predict_next_token: bool = False

    @property
    def initial(self) -> str | None:
        """The autoregressive checkpoint that it starts from."""
        return None if self.arm_init in (None, NONE) else self.arm_init


class TrainingPart(_Part):
    strategy: str
    learning_rate: Annotated[float, Field(gt=0)]
    batch_size: PositiveInt
    num_epochs: PositiveInt
    weight_decay: NonNegativeFloat = 0.01
    max_grad_norm: NonNegativeFloat = 1.0
    warmup_steps: NonNegativeInt = 0
    ema: _Share | None = None
    mode: str = "standard"
    confidence_threshold: _Share | None = None
    K: PositiveInt | None = None
    k_schedule: list[tuple[PositiveInt, NonNegativeInt]] | None = None
    block_size: _Size | None = None
    eos_id: NonNegativeInt | None = None
    logging_steps: PositiveInt | None = None
    eval_steps: PositiveInt | None = None
    save_steps: PositiveInt | None = None


class SamplingPart(_Part):
    temperature: NonNegativeFloat = 0.0
    confidence: list[str] | str = "top_k"
    unmasking_num: Annotated[list[PositiveInt], Field(min_length=1)] | PositiveInt = 1
    eos_id: NonNegativeInt | None = None


class ValidationPart(_Part):
    val_dir: str | None = None
    ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    sampling: SamplingPart = SamplingPart()


class DataLoading(_Part):
    per_gpu_batch_size: PositiveInt | None = None


class DataPart(_Part):
    dataset: Literal["sudoku", "tinygsm"]
    mask_id: NonNegativeInt
    data_dir: str
    val_ratio: _Share
    seed: NonNegativeInt = 2025
    training: DataLoading = DataLoading()


class WandbPart(_Part):
    wandb: bool = False
    project: str | None = None
    name: str | None = None
    entity: str | None = None


class _All(_Part):
    model: ModelPart
    training: TrainingPart
    data: DataPart
    validation: ValidationPart = ValidationPart()
    wandb: WandbPart = WandbPart()


@dataclass(frozen=True)
class Settings:
    """The settings of a training with `script`."""

    where: str
    """The file, for messages."""
    script: Script
    given: Mapping[str, Any]
    """Every value, by its whole key, such as `data.training.cpus`."""
    model: ModelPart
    training: TrainingPart
    data: DataPart
    validation: ValidationPart
    wandb: WandbPart

    @property
    def is_pool(self) -> bool:
        return self.training.strategy == "progressive"

    @property
    def block_size(self) -> int | None:
        """S, which the script decides, not the file."""
        return self.training.block_size if self.script == "train_block.py" else None

    @property
    def is_shifted(self) -> bool:
        """True if a token is predicted by what is read at the position before it."""
        return self.training.strategy == "arm" or self.model.initial is not None or self.model.predict_next_token

    @property
    def eos_id(self) -> int | None:
        sampling = self.validation.sampling.eos_id
        return self.training.eos_id if sampling is None else sampling

    @property
    def stages(self) -> list[tuple[int, int]]:
        """K from each step on, as (K, step); the first counts from step 0, whatever its step says."""
        schedule = self.training.k_schedule or [(self.training.K or 0, 0)]
        return [(schedule[0][0], 0), *schedule[1:]]


def read(file: Path, script: str | None = None) -> Settings:
    """Reads a YAML file, which `script` (default: `train_block.py` for the strategy `block`, else `train.py`) was
    started with.

    Raises:
        UserError: it is no such file, or a setting is missing, wrong, or one that its code refuses too.
    """
    return parse(formats.read_yaml(file), str(file), script)


def parse(tree: Any, where: str, script: str | None = None) -> Settings:
    """Checks the settings `tree`; the message of an error begins with `where`.

    Raises:
        UserError: as `read`.
    """
    if not isinstance(tree, dict) or not {"model", "training", "data"} <= set(tree):
        raise UserError(f"{where}: has no sections model, training and data, as the PUMA paper's code reads them")
    try:
        tree = _resolved(tree, tree, where)
        found = _All.model_validate_json(formats.to_json(tree))
    except ValidationError as error:
        raise UserError("\n".join(f"{where}: {_problem(detail)}" for detail in error.errors())) from error
    except UserError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: holds what is no setting: {error}") from error
    asked = script or ("train_block.py" if found.training.strategy == "block" else "train.py")
    chosen = next((name for name in STRATEGIES if name == asked), None)
    if chosen is None:
        raise UserError(f"--script {asked}: unknown; use one of {', '.join(STRATEGIES)}")
    parts = {name: getattr(found, name) for name in _All.model_fields}
    settings = Settings(where=where, script=chosen, given=dict(flatten(tree)), **parts)
    for problem in _problems(settings):
        raise UserError(f"{where}: {problem}")
    return settings


def _problem(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "missing":
        return f"{key} is missing; give it"
    if detail["type"] == "extra_forbidden":
        return f"{key}={str(detail['input'])[:60]!r}: the paper's code has no such part of a model; leave it out"
    return f"{key}={str(detail['input'])[:60]!r}: {detail['msg']}"


def _resolved(value: Any, root: dict[Any, Any], where: str, depth: int = 0) -> Any:
    """Replaces `${section.key}` by that setting."""
    if isinstance(value, dict):
        return {str(key): _resolved(inner, root, where, depth) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_resolved(inner, root, where, depth) for inner in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    found: Any = root
    for part in value.removeprefix("${").removesuffix("}").split("."):
        found = found.get(part) if isinstance(found, dict) else None
    is_whole = value.startswith("${") and value.endswith("}") and not isinstance(found, dict | list)
    if not is_whole or found is None or depth > 8:
        raise UserError(f"{where}: {value[:80]!r}: cannot be resolved; write the value itself")
    return _resolved(found, root, where, depth + 1)


def _problems(settings: Settings) -> Iterator[str]:
    """Yields what the paper's code fails at too, or what has no counterpart here."""
    model, training, data = settings.model, settings.training, settings.data
    if training.strategy not in (known := STRATEGIES[settings.script]):
        other: Script = "train_block.py" if settings.script == "train.py" else "train.py"
        hint = f"; {other} has it (--script {other})" if training.strategy in STRATEGIES[other] else ""
        yield f"training.strategy={training.strategy}: {settings.script} has {', '.join(known)}{hint}"
    if model.causal != (training.strategy == "arm"):
        yield (
            f"model.causal={str(model.causal).lower()} with training.strategy={training.strategy}: a causal model is "
            "trained with arm, and no other; set both alike"
        )
    if settings.is_pool:
        yield from _pool_problems(settings)
    if settings.script == "train_block.py":
        if training.block_size is None:
            yield "training.block_size is missing; train_block.py needs it"
        elif model.max_position % training.block_size:
            yield f"training.block_size={training.block_size}: must divide model.max_position={model.max_position}"
        if settings.is_shifted:
            yield "model.arm_init: train_block.py does not read it; set it to none"
    if data.mask_id >= model.vocab_size:
        yield f"data.mask_id={data.mask_id}: must be below model.vocab_size={model.vocab_size}"
    if data.dataset == "sudoku":
        if (model.vocab_size, data.mask_id) != (11, 10):
            yield f"model.vocab_size={model.vocab_size}, data.mask_id={data.mask_id}: a Sudoku has 11 ids, 10 the mask"
        if model.max_position < 2 * _CLUES:
            yield f"model.max_position={model.max_position}: a Sudoku has 162 positions, clues and answers"
    for order in _listed(settings.validation.sampling.confidence):
        if order not in OUR_ORDERS:
            yield f"validation.sampling.confidence: {order!r}: use {', '.join(OUR_ORDERS)}"


def _pool_problems(settings: Settings) -> Iterator[str]:
    training = settings.training
    if training.mode not in ("standard", "confidence_collapse"):
        yield f"training.mode={training.mode}: must be standard or confidence_collapse"
    if training.mode == "confidence_collapse" and training.confidence_threshold is None:
        yield "training.confidence_threshold is missing; mode: confidence_collapse needs it"
    if training.K is None and not training.k_schedule:
        yield "training.K is missing; give it, or k_schedule"
    for (_, earlier), (k, step) in pairwise(training.k_schedule or []):
        if step <= earlier:
            yield f"training.k_schedule: [{k}, {step}] comes after step {earlier}; steps must increase"


OUR_ORDERS = {"top_k": "prob", "top_k_margin": "margin", "entropy": "neg_entropy"}
"""Our orders, by the names of `validation.sampling.confidence`."""


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def orders(settings: Settings) -> list[str]:
    """Returns `validation.sampling.confidence` as a list."""
    return _listed(settings.validation.sampling.confidence)


def reveals(settings: Settings) -> list[int]:
    """Returns `validation.sampling.unmasking_num` as a list."""
    return _listed(settings.validation.sampling.unmasking_num)
