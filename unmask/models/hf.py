"""Reads the settings of Hugging Face checkpoints that are our transformer: any family in `models/families.py`.

A folder holds `config.json`, and the weights that `models/hf_weights.py` reads. Nothing in it is run, and its
numbers are checked before anything is built. Dimensions: R rows of a checkpoint's vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, ValidationError

from unmask import formats
from unmask.config.settings import check_section
from unmask.errors import UserError
from unmask.models.families import FAMILIES, Family, find_family
from unmask.models.transformer_config import TransformerConfig

_Size = Annotated[int, Field(gt=0, le=2**24)]
_Id = Annotated[int, Field(ge=0, lt=2**31)]


class _HfConfig(BaseModel):
    """The fields of `config.json` that decide the model."""

    model_config = ConfigDict(strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False)

    model_type: str
    vocab_size: _Size
    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: Annotated[int, Field(gt=0, le=10_000)]
    num_attention_heads: _Size
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    rms_norm_eps: PositiveFloat = 1e-6
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    """Written by transformers 5 in place of both fields above."""
    partial_rotary_factor: float | None = None
    layer_types: list[str] | None = None
    use_sliding_window: bool = False
    sliding_window: NonNegativeInt | None = 4096
    max_window_layers: NonNegativeInt = 28
    quantization_config: dict[str, Any] | None = None
    num_experts: int | None = None
    num_local_experts: int | None = None
    n_routed_experts: int | None = None
    max_position_embeddings: _Size | None = None

    is_causal: bool | None = None
    """False: transformers (from 5.2 on) lets every position see all others."""
    alignment: Literal["same", "next"] | None = None
    block_size: _Size | None = None
    mask_token_id: _Id | None = None
    eos_token_id: _Id | list[_Id] | None = None

    @property
    def theta(self) -> Any:
        return (self.rope_scaling or self.rope_parameters or {}).get("rope_theta", self.rope_theta)

    def unsupported(self, family: Family) -> Iterator[tuple[str, str]]:
        """Yields the fields that need something our transformer does not have, each with a fix."""
        if self.hidden_act != "silu":
            yield "hidden_act", "use a checkpoint with silu"
        if self.attention_bias and not family.qkv_bias:
            yield (
                "attention_bias",
                "its output projection has a bias as well; use a checkpoint with attention_bias=false",
            )
        if self.mlp_bias:
            yield "mlp_bias", "use a checkpoint with mlp_bias=false"
        for name in ("rope_scaling", "rope_parameters"):
            if _is_scaled(getattr(self, name) or {}):
                yield name, "use a checkpoint whose rope_type is default"
        if self.partial_rotary_factor not in (None, 1.0):
            yield "partial_rotary_factor", "use a checkpoint that rotates whole heads"
        if any(kind != "full_attention" for kind in self.layer_types or []):
            yield "layer_types", "use a checkpoint with full attention in every layer"
        has_windows = self.use_sliding_window and self.sliding_window is not None
        if self.layer_types is None and has_windows and self.max_window_layers < self.num_hidden_layers:
            yield "use_sliding_window", "set it to false there if no row is longer than sliding_window"
        if self.quantization_config is not None:
            yield "quantization_config", "use the checkpoint that was not quantised"
        for name in ("num_experts", "num_local_experts", "n_routed_experts"):
            if getattr(self, name):
                yield name, "a mixture of experts is not our transformer; use a dense checkpoint"


def _is_scaled(rope: dict[str, Any]) -> bool:
    """True if positions turn by other angles than `position * theta^(-2 e / E)`."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    is_plain = kind == "default" or (kind == "linear" and rope.get("factor") == 1)
    is_nested = any(isinstance(value, dict) for value in rope.values())  # angles of their own for kinds of layers
    return not is_plain or is_nested or rope.get("partial_rotary_factor", 1) != 1


def is_checkpoint(folder: str | Path) -> bool:
    """True if `folder` is Hugging Face's: its `config.json` names a `model_type`, and is no export of this package.

    The weights are not looked at: `read_weights` reports missing ones.
    """
    try:
        config = read_checkpoint_json(Path(folder) / "config.json")
    except UserError:
        return False
    return "model_type" in config and "unmask" not in (config.get("format"), config["model_type"])


@dataclass(frozen=True)
class HfCheckpoint:
    """A checkpoint as its `config.json` describes it."""

    file: Path
    """The `config.json`."""
    family_name: str
    num_rows: int
    """R: rows of the embedding, of which a tokenizer may use fewer."""
    settings: dict[str, Any]
    """The `model.*` settings that its weights or their results depend on."""
    alignment: Literal["same", "next"] | None
    """None: it is a causal model, or does not say."""
    block_size: int | None
    says_block_size: bool
    """False if it is the family's."""
    mask_id: int | None
    """The mask that `config.json` names."""
    eos_ids: tuple[int, ...]
    max_length: int | None

    @property
    def family(self) -> Family:
        return FAMILIES[self.family_name]


def read_checkpoint(folder: str | Path) -> HfCheckpoint:
    """Reads what `config.json` in `folder` says.

    Raises:
        UserError: no `config.json`, a model of no family that is known, or one with what our transformer does not have:
            experts, other activations, scaled or partial positions, sliding windows, more biases.
    """
    file = Path(folder) / "config.json"
    given = read_checkpoint_json(file)
    name = find_family(given, str(file))
    family = FAMILIES[name]
    for key, accepted in family.only.items():
        if given.get(key) is not None and given[key] not in accepted:
            raise UserError(f"{file}: {key}={given[key]!r} is not supported; use a checkpoint with {accepted[0]!r}")
    config = _parse(given, family, file)
    for key, fix in config.unsupported(family):
        raise UserError(f"{file}: {family.keys.get(key, key)}={getattr(config, key)!r} is not supported; {fix}")
    eos_ids = config.eos_token_id if config.eos_token_id is not None else []
    is_same = config.is_causal is False and family.alignment is None
    return HfCheckpoint(
        file=file,
        family_name=name,
        num_rows=config.vocab_size,
        settings=_settings(config, family, file),
        alignment=family.alignment or config.alignment or ("same" if is_same else None),
        block_size=config.block_size or family.block_size,
        says_block_size=config.block_size is not None,
        mask_id=config.mask_token_id,
        eos_ids=tuple(eos_ids if isinstance(eos_ids, list) else [eos_ids]),
        max_length=config.max_position_embeddings,
    )


def read_model_settings(folder: str | Path) -> dict[str, Any]:
    """Reads the `model.*` settings (fields of `TransformerConfig`) that a checkpoint needs.

    Raises:
        UserError: as `read_checkpoint`.
    """
    return read_checkpoint(folder).settings


def _settings(config: _HfConfig, family: Family, file: Path) -> dict[str, Any]:
    settings = {
        "dim": config.hidden_size,
        "ff_dim": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads or config.num_attention_heads,
        "head_dim": config.head_dim or config.hidden_size // config.num_attention_heads,
        "qkv_bias": family.qkv_bias,
        "qk_norm": family.qk_norm,
        "rotary": True,
        "rope_theta": config.theta,
        "rotary_layout": "standard",
        "learned_positions": False,
        "tied_head": config.tie_word_embeddings,
        "norm_eps": config.rms_norm_eps,
    }
    if (alignment := family.alignment or config.alignment) is not None:
        settings["alignment"] = alignment
    try:
        check_section(TransformerConfig, settings, "model")
    except UserError as error:
        raise UserError(f"{file}: no such model can be built: {error}; download it again") from error
    return settings


def check_settings(folder: str | Path, config: TransformerConfig) -> None:
    """Checks that `config` is the checkpoint's model, in every setting that its weights or their results depend on.

    Raises:
        UserError: as `read_checkpoint`, or naming every setting that differs.
    """
    own = config.model_dump() | {
        "num_kv_heads": config.key_heads,
        "head_dim": config.head_width,
    }
    wrong = [
        f"model.{name}={own[name]!r}, the checkpoint has {value!r}"
        for name, value in read_model_settings(folder).items()
        if own[name] != value
    ]
    if wrong:
        raise UserError(f"train.init={folder}: {'; '.join(wrong)}; set {'it' if len(wrong) == 1 else 'them'} so")


def _parse(given: Mapping[str, Any], family: Family, file: Path) -> _HfConfig:
    renamed = {ours: given[theirs] for ours, theirs in family.keys.items() if given.get(theirs) is not None}
    try:
        return _HfConfig.model_validate({**family.defaults, **given, **renamed})
    except ValidationError as error:
        detail = error.errors()[0]
        field, *_ = detail["loc"]  # of a union, pydantic names the kinds behind it
        name = family.keys.get(str(field), str(field))
        fault = "is missing" if detail["type"] == "missing" else f"{detail['input']!r}: {detail['msg']}"
        raise UserError(f"{file}: {name}: {fault}; download it again") from error


def read_checkpoint_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object of a checkpoint.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        value = formats.read_json(file)
    except UserError as error:
        problem = str(error).removeprefix(f"{file}: ").removeprefix("cannot be read: ")
        raise UserError(
            f"{file}: cannot be read: {problem}; name the folder of a checkpoint, or download it again"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: holds no JSON object; download it again")
    return value
