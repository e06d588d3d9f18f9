"""The settings of the transformer: its section `model`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from unmask.config.settings import Section, known
from unmask.models.backends import BACKENDS
from unmask.models.loops import Loops
from unmask.models.lora import LoraConfig
from unmask.models.presets import PRESETS, find_preset
from unmask.models.visibility import AttentionPattern


class TransformerConfig(Section):
    """Sizes and options; `preset` fills in what is not given."""

    aliases: ClassVar[dict[str, str]] = {"block_length": "block_size"}
    needs: ClassVar[dict[str, str]] = dict.fromkeys(("rope_theta", "rotary_layout"), "rotary=true")

    name: str = "transformer"
    preset: str | None = Field(None, description=f"{', '.join(PRESETS)}; a Hugging Face train.init takes its place")
    dim: int = Field(ge=2, description="width of the embeddings and between blocks")
    ff_dim: int = Field(ge=1, description="inner width of the SwiGLU")
    num_layers: int = Field(ge=1, le=10_000, description="blocks of attention and SwiGLU")
    num_heads: int = Field(ge=1, description="of attention")
    num_kv_heads: int | None = Field(None, ge=1, description="null = num_heads")
    head_dim: int | None = Field(None, ge=1, description="width of a head; null = dim / num_heads")
    qkv_bias: bool = Field(False, description="queries, keys and values have a bias, as in Qwen2")
    out_bias: bool = Field(False, description="so has the projection after attention, as in the PUMA paper's code")
    qk_norm: bool = Field(False, description="RMSNorm over each head's queries and keys, as in Qwen3")
    dropout: float = Field(0.0, ge=0, lt=1, description="of attention and of what each block adds; in training alone")
    rotary: bool = Field(True, description="rotary positions in every layer")
    rope_theta: float = Field(10_000.0, gt=0, description="base of the rotary frequencies")
    rotary_layout: Literal["standard", "reference"] = Field(
        "standard",
        description="angles that channels turn by; reference: as in the PUMA paper's code, two of them in a pair",
    )
    learned_positions: bool = Field(False, description="a learned embedding per absolute position")
    tied_head: bool = Field(False, description="the output matrix is the embedding's")
    init: Literal["scaled", "zero", "reference"] = Field(
        "scaled",
        description="first weights; scaled: normal, 1 / sqrt(inputs), less onto the residual stream; zero: 0 onto it, "
        "so that every block begins by adding nothing (1901.09321); reference: uniform in +-1 / sqrt(inputs), biases "
        "too, as PyTorch's layers and so the PUMA paper's code start",
    )
    embedding_std: float | None = Field(
        None,
        gt=0,
        description="standard deviation of the first embeddings; null = 1 / sqrt(dim), and 1 with init=reference",
    )
    norm_eps: float = Field(1e-6, gt=0, description="what an RMSNorm adds to the mean square")
    checkpointing: bool = Field(
        False, description="compute every block again in the backward pass: less memory for a third more time"
    )
    attention: Annotated[str, known("attention", {"auto": None, **BACKENDS})] = Field(
        "auto", description=f"auto = the fastest; or {', '.join(BACKENDS)}"
    )
    causal: bool = Field(False, description="a position sees itself and those before it; for process.name=ar")
    block_size: int | None = Field(
        None,
        ge=1,
        description="S: a block of S positions sees itself and the blocks before it; set by process.block_size",
    )
    alignment: Literal["same", "next"] = Field(
        "same", description="next: position i is predicted by what is read at i - 1, as AR models learn it"
    )
    self_conditioning: bool = Field(
        False, description="masked positions also get their expected embedding from an earlier pass (2208.04202)"
    )
    loops: Loops | None = Field(None, description="layers that a pass runs several times (2605.26106); null = none")
    lora: LoraConfig | None = Field(None, description="adapters, on frozen weights of train.init; null = train all")

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if given.get("preset") is None:
            if missing := [key for key in ("dim", "ff_dim", "num_layers", "num_heads") if key not in given]:
                raise ValueError(f"give model.preset ({', '.join(PRESETS)}), or model.{', model.'.join(missing)}")
            return given
        return {**find_preset(str(given["preset"])), **given}

    @model_validator(mode="after")
    def _check_heads(self) -> "TransformerConfig":
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(f"model.num_heads={self.num_heads} does not divide model.dim={self.dim}")
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}")
        if self.rotary and self.head_width % 2:
            cause = "num_heads" if self.head_dim is None else "head_dim"
            raise ValueError(f"model.rotary needs an even head width, not {self.head_width}; change {cause}")
        if self.attention == "flex" and self.dropout:
            raise ValueError(f"model.attention=flex has no dropout; use sdpa, or 0 instead of {self.dropout}")
        if self.causal and self.block_size is not None:
            raise ValueError(
                f"model.block_size={self.block_size}: a causal model has no blocks; set model.causal=false, or "
                "model.block_size=null"
            )
        if self.causal and self.alignment != "next":
            raise ValueError("model.causal=true sees the token that it predicts; set model.alignment=next")
        if self.causal and self.self_conditioning:
            raise ValueError("model.self_conditioning=true is for masked positions; set it or model.causal to false")
        if self.loops is not None:
            self.loops.check(self.num_layers)
        if self.lora is not None and self.self_conditioning:
            raise ValueError("model.self_conditioning=true learns a matrix, which model.lora would freeze; set one")
        if not (self.rotary or self.learned_positions):
            raise ValueError("the model would not know its positions; set model.rotary or model.learned_positions")
        return self

    @property
    def seen(self) -> AttentionPattern:
        """Returns the attention pattern of one stream."""
        return AttentionPattern(1 if self.causal else self.block_size)

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.dim // self.num_heads
