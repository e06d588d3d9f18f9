"""Low-rank adapters (Hu et al. 2021, 2106.09685) on a frozen base, which may be held in 4 bits (2305.14314).

An adapted layer computes `W x + alpha / rank * B A dropout(x)`; A and B are PEFT's. The base is no part of the model's
state: its tensors are buffers that are not saved, so that optimizer, average and checkpoints hold what is trained.

Dimensions: B rows, L positions, D width, V vocabulary, I inputs and O outputs of a layer.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from unmask import noise
from unmask.config.settings import Section
from unmask.errors import UserError
from unmask.models.on_demand import OnDemand, outline, outlines_of

Target = Literal["q", "k", "v", "out", "gate", "up", "down"]
_MODULES = {
    **{name: f"attention.{name}" for name in ("q", "k", "v", "out")},
    **{name: f"mlp.{name}" for name in ("gate", "up", "down")},
}
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"
_EMBEDDING, _MASK_DELTA = "backbone.embedding.weight", "backbone.embedding.mask_delta"


class LoraConfig(Section):
    """Adapters on a frozen base, `train.init`."""

    rank: int = Field(8, ge=1, le=65_536, description="of the adapters")
    alpha: float | None = Field(
        None, gt=0, description="an adapter's part is multiplied by alpha / rank; null = 2 x rank"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="of an adapter's input; in training alone")
    targets: list[Target] = Field(
        list(get_args(Target)), min_length=1, description=f"layers of every block, of {', '.join(get_args(Target))}"
    )
    base: Literal["bfloat16", "float32", "nf4"] = Field(
        "bfloat16",
        description="format that the base is held in; nf4: blocks in 4 bits (QLoRA), embedding and head bf16",
    )
    mask_row: Literal["auto"] | bool = Field(
        "auto", description="train the mask token's embedding; auto = where train.init has no row for it"
    )

    @field_validator("targets")
    @classmethod
    def _sort(cls, value: list[str]) -> list[str]:
        return [name for name in get_args(Target) if name in value]

    @property
    def scale(self) -> float:
        return (self.alpha or 2 * self.rank) / self.rank


# --- the frozen base -------------------------------------------------------------------------------------------------


class _Frozen(nn.Module):
    """Holds buffers that are not saved, and keep their format when the model's changes."""

    frozen: tuple[str, ...] = ("weight", "bias")

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "_Frozen":
        held = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        unread = {name: each for name, each in held.items() if each.is_meta}  # go nowhere before `load_base`
        self._buffers |= dict.fromkeys(unread)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in held.keys() - unread.keys():
            self._buffers[name] = self.get_buffer(name).to(held[name].dtype)
        self._buffers |= unread
        return self

    def _hold(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else tensor.detach(), persistent=False)


class FrozenLinear(_Frozen):
    """A linear layer of the base, which computes in the format of its input, or in autocast's."""

    weight: Float[Tensor, "O I"]
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, base: str) -> None:
        super().__init__()
        self._hold(weight=linear.weight.to(_matrix_format(base)), bias=linear.bias)

    def forward(self, x: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows O"]:
        if torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class FourBitLinear(_Frozen):
    """A linear layer of the base in nf4, with scales that are quantised as well; the GPU's copy is packed too."""

    bias: Tensor | None
    packed: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.shape = linear.weight.shape
        self._hold(packed=torch.empty(0, dtype=torch.uint8), bias=linear.bias)
        self.scales: Any = None
        if not linear.weight.is_meta:
            self.set_weight(linear.weight.detach())

    def set_weight(self, value: Float[Tensor, "O I"]) -> None:
        self.packed, self.scales = _quantise(value.float().to(self.packed.device))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "FourBitLinear":
        super()._apply(fn, recurse)
        if self.scales is not None:
            self.scales.to(self.packed.device)
        return self

    def forward(self, x: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows O"]:
        device = x.device.type
        narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        # Its backward pass unpacks the weight again, instead of keeping it.
        y = _bitsandbytes().matmul_4bit(x.to(narrow), self.packed, quant_state=self.scales)
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.to(torch.promote_types(y.dtype, x.dtype)) if narrow == torch.float32 else y


class FrozenEmbedding(_Frozen):
    """The base's embedding, and what training adds to the mask token's row."""

    frozen = ("weight",)
    weight: Float[Tensor, "V D"]
    is_trained: Tensor

    def __init__(self, embedding: nn.Embedding, base: str, mask_id: int | None) -> None:
        super().__init__()
        self.mask_id = mask_id
        self._hold(weight=embedding.weight.to(_matrix_format(base)), is_trained=torch.zeros(()))
        # Fp32 with a bfloat16 base: small updates would vanish. Where it is not trained its gradient is 0.
        self.mask_delta = None if mask_id is None else nn.Parameter(torch.zeros(embedding.embedding_dim))

    def forward(self, xt: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        rows = F.embedding(xt, self.weight)
        if self.mask_delta is None:
            return rows
        is_mask = xt.eq(self.mask_id or 0).unsqueeze(-1)
        return rows.to(self.mask_delta.dtype) + is_mask * (self.is_trained * self.mask_delta)


def _matrix_format(base: str) -> torch.dtype:
    """Returns the format of matrices that are not in 4 bits."""
    return torch.float32 if base == "float32" else torch.bfloat16


def _quantise(weight: Float[Tensor, "O I"]) -> tuple[Tensor, Any]:
    functional = _bitsandbytes().functional
    packed, scales = functional.quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4")
    return packed, scales


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(f"model.lora needs PEFT: pip install 'unmask[peft]' ({error})") from error
    return peft


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            f"model.lora.base=nf4 needs bitsandbytes: pip install 'unmask[qlora]', or use bfloat16 ({error})"
        ) from error
    return bitsandbytes


# --- adapters in a model ---------------------------------------------------------------------------------------------


def add_adapters(backbone: nn.Module, config: LoraConfig, *, mask_id: int, seed: int) -> None:
    """Adds adapters to a transformer, in place, and freezes everything else.

    B starts at 0, so that the model is at first its base; A is uniform in +-`1 / sqrt(inputs)`, drawn from `seed`.
    A transformer on the meta device gets adapters on the CPU, and its base stays there until `load_base`.

    Raises:
        UserError: a package is missing.
    """
    peft = _peft()
    own = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.scale * config.rank,
        lora_dropout=config.dropout,
        target_modules=[_MODULES[name] for name in config.targets],
        bias="none",
    )
    peft.inject_adapter_in_model(own, backbone)
    _draw(backbone, seed)
    for path, parent in [*backbone.named_modules()]:
        if ".lora_" in path:
            continue
        for name, child in [*parent.named_children()]:
            if type(child) is nn.Linear:
                is_packed = config.base == "nf4" and path.startswith("blocks.")
                setattr(parent, name, FourBitLinear(child) if is_packed else FrozenLinear(child, config.base))
            elif type(child) is nn.Embedding:
                is_tokens = path == "" and name == "embedding"
                setattr(parent, name, FrozenEmbedding(child, config.base, mask_id if is_tokens else None))
    for module in backbone.modules():
        if isinstance(module, nn.RMSNorm):
            weight = module.weight.detach()
            del module.weight
            on_cpu = torch.ones_like(weight, device="cpu") if weight.is_meta else weight
            module.register_buffer("weight", on_cpu, persistent=False)
            module.frozen = ("weight",)  # type: ignore[assignment]


@torch.no_grad()
def _draw(backbone: nn.Module, seed: int) -> None:
    for path, module in backbone.named_modules():
        name = f"{path}.weight"
        if not name.endswith((_A, _B)):
            continue
        if module.weight.is_meta:
            module.to_empty(device="cpu")
        parameter = module.weight
        if name.endswith(_B):
            parameter.zero_()
            continue
        bound = parameter.shape[1] ** -0.5
        parameter.uniform_(-bound, bound, generator=noise.generator(seed, name, parameter.device))


def has_adapters(model: nn.Module) -> bool:
    return isinstance(getattr(getattr(model, "backbone", None), "embedding", None), FrozenEmbedding)


@torch.no_grad()
def load_base(model: nn.Module, tensors: Mapping[str, Tensor], *, trains_mask_row: bool) -> None:
    """Sets the base from `tensors`, which have the names that they have without adapters, one after the other.

    They are read in the order of their names.
    """
    embedding: Any = model.backbone.embedding  # type: ignore[union-attr]
    for name, module, key in sorted(_base(model), key=lambda each: each[0]):
        if key == "weight" and isinstance(module, FourBitLinear):
            module.set_weight(tensors[name])
        else:
            held = module.get_buffer(key)
            setattr(module, key, torch.empty_like(held, device=embedding.is_trained.device).copy_(tensors[name]))
    embedding.is_trained.fill_(float(trains_mask_row))


def draw_base(model: nn.Module, seed: int) -> None:
    """Sets a random base, as large as any: for measurements."""
    shapes = {name: _shape_of(module, key) for name, module, key in _base(model)}

    def draw(name: str) -> Tensor:
        drawn = torch.randn(shapes[name], generator=noise.generator(seed, name))
        return drawn / shapes[name][-1] ** 0.5 if drawn.ndim > 1 else torch.ones_like(drawn)

    outlines = {name: outline(shape, torch.float32) for name, shape in shapes.items()}
    load_base(model, OnDemand(outlines, draw), trains_mask_row=False)


def _shape_of(module: nn.Module, key: str) -> torch.Size:
    if key == "weight" and isinstance(module, FourBitLinear):
        return module.shape
    return module.get_buffer(key).shape


def _base(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yields each tensor of the base: its name without adapters, its module, and its name there."""
    for path, module in model.named_modules():
        for key in getattr(module, "frozen", ()):
            if getattr(module, "packed" if key == "weight" and isinstance(module, FourBitLinear) else key) is not None:
                yield f"{path.removesuffix('.base_layer')}.{key}", module, key


# --- adapters as tensors ---------------------------------------------------------------------------------------------


def merge(base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], config: LoraConfig, mask_id: int) -> OnDemand:
    """Returns the weights of the model without adapters: `W + alpha / rank * B A`, with W as it is held in training.

    Each is made when it is asked for; they come in the order of `base`.

    Raises:
        UserError: the adapters are not those of `config` on this base.
    """
    _check(base, adapters, config)

    def merged(name: str) -> Tensor:
        value = _as_held(name, base[name], config.base)
        stem = name.removesuffix(".weight")
        if f"{stem}{_A}" in adapters:
            product = adapters[f"{stem}{_B}"].double() @ adapters[f"{stem}{_A}"].double()
            return (value.double() + config.scale * product).to(value.dtype)
        if name == _EMBEDDING:
            value = value.clone()
            value[mask_id] += adapters[_MASK_DELTA].to(value.dtype)
        return value

    return OnDemand(outlines_of(base), merged)


def _as_held(name: str, value: Tensor, base: str) -> Tensor:
    if value.ndim < 2 or base == "float32":
        return value
    if base == "nf4" and ".blocks." in name:
        unpacked: Tensor = _bitsandbytes().functional.dequantize_4bit(*_quantise(value.float()))
        return unpacked.to(value.dtype)
    return value.bfloat16().to(value.dtype)


def _check(base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], config: LoraConfig) -> None:
    outlines, given = outlines_of(base), outlines_of(adapters)
    expected: dict[str, tuple[int, ...]] = {_MASK_DELTA: (outlines[_EMBEDDING].shape[1],)}
    for name, value in outlines.items():
        if name.endswith(tuple(f".{_MODULES[target]}.weight" for target in config.targets)):
            stem = name.removesuffix(".weight")
            expected |= {f"{stem}{_A}": (config.rank, value.shape[1]), f"{stem}{_B}": (value.shape[0], config.rank)}
    wrong = [
        name
        for name in sorted({*expected, *given})
        if name not in given or expected.get(name) != tuple(given[name].shape)
    ]
    if wrong:
        raise UserError(f"the adapters do not fit their base and model.lora: {', '.join(wrong[:3])}; is it this run's?")


def to_peft(
    base: Mapping[str, Tensor],
    adapters: Mapping[str, Tensor],
    config: LoraConfig,
    *,
    their_name: Callable[[str], str],
    source: str,
    mask_row: tuple[int, int] | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns tensors and `adapter_config.json` as PEFT's LoRA has them, on a model of Hugging Face's.

    Args:
        base: the weights that the adapters are for.
        adapters: as in a checkpoint.
        config: their settings.
        their_name: from our name of a parameter, without `backbone.`, to theirs.
        source: the base's folder.
        mask_row: our id and theirs of the mask token, whose row is trained too; None: it is not.
    """
    _check(base, adapters, config)
    tensors: dict[str, Tensor] = {}
    targets: set[str] = set()
    *_, head = their_name("head.weight").removesuffix(".weight").split(".")
    for name, value in adapters.items():
        for part, kind in ((_A, "lora_A"), (_B, "lora_B")):
            if name.endswith(part):
                theirs = their_name(name.removesuffix(part).removeprefix("backbone.") + ".weight")
                theirs = theirs.removesuffix(".weight")
                short = theirs.rpartition(".")[2]
                # PEFT adapts whatever has a target's name at its end: in LLaDA the head, too.
                targets.add(theirs if short == head else short)
                tensors[f"base_model.model.{theirs}.{kind}.weight"] = value.contiguous()
    description: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": source,
        "r": config.rank,
        "lora_alpha": config.scale * config.rank,
        "lora_dropout": config.dropout,
        "target_modules": sorted(targets),
        "bias": "none",
        "inference_mode": True,
    }
    if mask_row is not None:
        ours, row = mask_row
        held = _as_held("embedding", base[_EMBEDDING][ours : ours + 1], config.base)
        theirs = their_name("embedding.weight").removesuffix(".weight")
        tensors[f"base_model.model.{theirs}.token_adapter.trainable_tokens_delta"] = held + adapters[_MASK_DELTA]
        description["trainable_token_indices"] = [row]
    return tensors, description
