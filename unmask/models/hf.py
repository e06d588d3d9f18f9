"""Reads checkpoints of Hugging Face's Llama and Qwen models: their settings and weights, under our names.

A folder holds `config.json` and `model.safetensors`, or several files that `model.safetensors.index.json` lists.
Dimensions: R rows of a checkpoint's vocabulary, V of ours, D width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from unmask import formats
from unmask.config.settings import check_section
from unmask.errors import UserError
from unmask.models.transformer import Transformer, TransformerConfig
from unmask.progress import warn
from unmask.types import TokenSpec

# --- settings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Family:
    """The differences of a `model_type` from Llama."""

    qkv_bias: bool = False
    qk_norm: bool = False
    defaults: dict[str, int] = field(default_factory=dict)
    """Values that transformers takes for fields missing in `config.json`."""


_FAMILIES = {
    "llama": _Family(),
    "qwen2": _Family(qkv_bias=True, defaults={"num_key_value_heads": 32}),
    "qwen3": _Family(qk_norm=True, defaults={"num_key_value_heads": 32, "head_dim": 128}),
}


_Size = Annotated[int, Field(gt=0, le=2**24)]


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

    @property
    def family(self) -> _Family:
        return _FAMILIES[self.model_type]

    @property
    def theta(self) -> Any:
        return (self.rope_scaling or self.rope_parameters or {}).get("rope_theta", self.rope_theta)

    def unsupported(self) -> Iterator[tuple[str, str]]:
        """Yields the fields that need something our transformer does not have, each with a fix."""
        if self.hidden_act != "silu":
            yield "hidden_act", "use a checkpoint with silu"
        if self.attention_bias and not self.family.qkv_bias:
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
        config = _read_json(Path(folder) / "config.json")
    except UserError:
        return False
    return "model_type" in config and config.get("format") != "unmask"


def read_config(folder: str | Path) -> dict[str, Any]:
    """Reads the `model.*` settings (fields of `TransformerConfig`) that a checkpoint needs.

    Raises:
        UserError: no `config.json`, a model that is neither Llama nor Qwen2 (2.5) nor Qwen3, or one with what our
            transformer does not have: other activations, scaled positions, sliding windows, more biases.
    """
    file = Path(folder) / "config.json"
    config = _parse(file)
    for name, fix in config.unsupported():
        raise UserError(f"{file}: {name}={getattr(config, name)!r} is not supported; {fix}")
    settings = {
        "dim": config.hidden_size,
        "ff_dim": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads or config.num_attention_heads,
        "head_dim": config.head_dim or config.hidden_size // config.num_attention_heads,
        "qkv_bias": config.family.qkv_bias,
        "qk_norm": config.family.qk_norm,
        "rotary": True,
        "rope_theta": config.theta,
        "learned_positions": False,
        "tied_head": config.tie_word_embeddings,
        "norm_eps": config.rms_norm_eps,
    }
    try:
        check_section(TransformerConfig, settings, "model")
    except UserError as error:
        raise UserError(f"{file}: no such model can be built: {error}; download it again") from error
    return settings


def check_settings(folder: str | Path, config: TransformerConfig) -> None:
    """Checks that `config` is the checkpoint's model, in every setting that its weights or their results depend on.

    Raises:
        UserError: as `read_config`, or naming every setting that differs.
    """
    own = config.model_dump() | {
        "num_kv_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.head_width,
    }
    wrong = [
        f"model.{name}={own[name]!r}, the checkpoint has {value!r}"
        for name, value in read_config(folder).items()
        if own[name] != value
    ]
    if wrong:
        raise UserError(f"train.init={folder}: {'; '.join(wrong)}; set {'it' if len(wrong) == 1 else 'them'} so")


def _parse(file: Path) -> _HfConfig:
    given = _read_json(file)
    kind = given.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise UserError(f"{file}: model_type={kind!r} is unknown; use a checkpoint of {', '.join(_FAMILIES)}")
    try:
        return _HfConfig.model_validate(_FAMILIES[kind].defaults | given)
    except ValidationError as error:
        detail = error.errors()[0]
        name = ".".join(str(part) for part in detail["loc"])
        fault = "is missing" if detail["type"] == "missing" else f"{detail['input']!r}: {detail['msg']}"
        raise UserError(f"{file}: {name}: {fault}; download it again") from error


def _read_json(file: Path) -> dict[str, Any]:
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


# --- weights ---------------------------------------------------------------------------------------------------------

_OUTER = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_IN_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_FEW = 16
"""Tokens without a row that every tokenizer may have."""
_LONGEST_NAME = 255  # bytes that file systems take
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_weights(
    folder: str | Path, *, original_ids: Sequence[int | None] | None, vocab_size: int
) -> dict[str, Float[Tensor, "..."]]:
    """Reads a checkpoint's weights in fp32, by their names in `Denoiser.state_dict()`.

    A new token's row, in embedding and head, is the mean of the checkpoint's R rows.

    Args:
        folder: the checkpoint.
        original_ids: the checkpoint's id of each of our tokens, None for a new one, such as the mask. Default: ids are
            the checkpoint's; rows beyond `vocab_size` are dropped. A few ids may lie behind the checkpoint's last row:
            these are new too.
        vocab_size: V, including the mask token.

    Raises:
        UserError: as `read_config`; a file that is missing or damaged; tensors that are missing, unknown or of other
            shapes than `config.json` says; tokens that the checkpoint does not have.
    """
    folder = Path(folder)
    tensors = _load_tensors(folder)
    rows = _rows(_list_of_weights(folder), len(tensors["embedding.weight"]), original_ids, vocab_size)
    for name in {"embedding.weight", "head.weight"} & tensors.keys():
        tensors[name] = _select(tensors[name], rows)
    return {f"backbone.{name}": tensor for name, tensor in tensors.items()}


def _load_tensors(folder: Path) -> dict[str, Tensor]:
    """Loads exactly the tensors of `Transformer`, by its names, in fp32."""
    expected, found = _expected(folder), {}
    for file in _files(folder):
        for theirs, tensor in _tensors(file, {name: shape for name, (_, shape) in expected.items()}).items():
            if theirs in expected:
                found[expected[theirs][0]] = tensor.float()
            # Ignored, as transformers does: the angles that old checkpoints hold, and the copy of a tied head.
            elif not theirs.endswith("rotary_emb.inv_freq") and theirs != "lm_head.weight":
                raise UserError(f"{file}: {theirs} is not part of the model in config.json; download both again")
    for theirs, (ours, _) in expected.items():
        if ours not in found:
            raise UserError(f"{_list_of_weights(folder)}: lacks {theirs}; download the checkpoint again")
    return found


def _expected(folder: Path) -> dict[str, tuple[str, torch.Size]]:
    """Maps the checkpoint's names of its tensors to our names and shapes."""
    settings, num_rows = read_config(folder), _parse(folder / "config.json").vocab_size
    with torch.device("meta"):
        model = Transformer(TransformerConfig(**settings), TokenSpec(vocab_size=num_rows, length=1, mask_id=0))
    return {_their_name(ours): (ours, parameter.shape) for ours, parameter in model.named_parameters()}


def _their_name(ours: str) -> str:
    module, kind = ours.rsplit(".", 1)
    if module in _OUTER:
        return f"{_OUTER[module]}.{kind}"
    _, layer, part = module.split(".", 2)
    return f"model.layers.{layer}.{_IN_BLOCK[part]}.{kind}"


def _list_of_weights(folder: Path) -> Path:
    """Returns the file of weights, or, if only that exists, the index of several; in this order, as transformers."""
    single, index = folder / _SINGLE, folder / _INDEX
    return single if single.exists() or not index.exists() else index


def _files(folder: Path) -> list[Path]:
    file = _list_of_weights(folder)
    return [file] if file.name == _SINGLE else listed_files(file)


def listed_files(index: Path) -> list[Path]:
    """Returns the files of weights that an index lists.

    Raises:
        UserError: it lists something else than safetensors in its own folder.
    """
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: has no weight_map of file names; download it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or len(name.encode()) > _LONGEST_NAME:
            raise UserError(f"{index}: weight_map names {name[:100]!r}, which is no safetensors file beside it")
    return [index.with_name(name) for name in names]


def _tensors(file: Path, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Reads a file whose tensors have these shapes, as far as they are known; the heads are checked first."""
    if not file.exists():
        raise UserError(f"{file}: is missing; download it, or save the checkpoint again as safetensors")
    if not file.is_file():  # a fifo would wait for its writer
        raise UserError(f"{file}: is no regular file; download it again")
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                shape = opened.get_slice(name).get_shape()
                if name in shapes and tuple(shape) != shapes[name]:
                    raise UserError(
                        f"{file}: {name} has shape {tuple(shape)}, its config.json says {tuple(shapes[name])}; "
                        "download both again"
                    )
            tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: damaged: {error}; download it again") from error
    for name in shapes.keys() & tensors.keys():
        if not tensors[name].is_floating_point():
            raise UserError(f"{file}: {name} is of {tensors[name].dtype}; use the checkpoint that was not quantised")
        if not bool(tensors[name].isfinite().all()):
            raise UserError(f"{file}: {name} holds nan or infinity; download it again")
    return tensors


def _rows(
    file: Path, num_rows: int, original_ids: Sequence[int | None] | None, vocab_size: int
) -> Sequence[int | None]:
    """Returns the checkpoint's row of each of V tokens, None for a new one and for those behind its last row.

    A tokenizer may have tokens that were added to it, a mask among them, and to the embedding not. Where many have no
    row, it is the tokenizer of another model.
    """
    ids = range(vocab_size) if original_ids is None else original_ids
    if len(ids) != vocab_size:
        raise UserError(f"{file}: {len(ids)} original ids for {vocab_size} tokens; give one for each")
    behind = [token for token, row in enumerate(ids) if row is not None and not 0 <= row < num_rows]
    negative = any(row is not None and row < 0 for row in ids)
    if negative or len(behind) > max(_FEW, vocab_size // 20):
        raise UserError(
            f"{file}: has {num_rows} tokens, and none for {len(behind)} of this run's {vocab_size} (token {behind[0]} "
            f"stands for its {ids[behind[0]]}); prepare the data with the checkpoint's tokenizer"
        )
    if len(behind) > (original_ids is None):  # without a tokenizer, one more than there are rows is the mask
        warn(
            f"{file}: has {num_rows} tokens, and no row for {len(behind)} of this run's; they start as the mean of all "
            f"rows (the first is token {behind[0]})"
        )
    return [None if row is not None and row >= num_rows else row for row in ids]


def _select(matrix: Float[Tensor, "R D"], rows: Sequence[int | None]) -> Float[Tensor, "V D"]:
    """Selects rows of `matrix`; None: the mean of all."""
    index = torch.tensor([len(matrix) if row is None else row for row in rows])
    return torch.cat([matrix, matrix.mean(dim=0, keepdim=True)])[index]
