"""The families of Hugging Face checkpoints that are our transformer up to names: a row for each.

A family is data: which options of the transformer it has, how its `config.json` and its tensors are named, and what its
checkpoints leave unsaid. `models/hf.py` reads all of them in the same way, and `models/hf_writing.py` writes those
that `LAYOUTS` names, by the same rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from unmask.errors import UserError


@dataclass(frozen=True)
class TensorNames:
    """The names of a checkpoint's tensors, without `.weight` and `.bias`, by those of `Transformer`."""

    outer: Mapping[str, str]
    block: str
    """The prefix of a block, with `{}` for its number."""
    inner: Mapping[str, str]

    def theirs(self, ours: str) -> str:
        """Returns the checkpoint's name of the parameter `ours` of `Transformer`."""
        module, kind = ours.rsplit(".", 1)
        if module in self.outer:
            return f"{self.outer[module]}.{kind}"
        _, layer, part = module.split(".", 2)
        return f"{self.block.format(layer)}.{self.inner[part]}.{kind}"


BY_TOKEN = ("embedding.weight", "head.weight")
"""The parameters of `Transformer` that have a row for each token."""
LLAMA_NAMES = TensorNames(
    outer={"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
    block="model.layers.{}",
    inner={
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
    },
)
LLADA_NAMES = TensorNames(
    outer={
        "embedding": "model.transformer.wte",
        "norm": "model.transformer.ln_f",
        "head": "model.transformer.ff_out",
    },
    block="model.transformer.blocks.{}",
    inner={
        "attention_norm": "attn_norm",
        "attention.q": "q_proj",
        "attention.k": "k_proj",
        "attention.v": "v_proj",
        "attention.out": "attn_out",
        "mlp_norm": "ff_norm",
        "mlp.gate": "ff_proj",
        "mlp.up": "up_proj",
        "mlp.down": "ff_out",
    },
)
# The PUMA paper's code has no `config.json`, so is no family of that. In the order in which its module has its parts.
PUMA_NAMES = TensorNames(
    outer={"embedding": "emb", "norm": "final_norm", "head": "lm_head"},
    block="layers.{}",
    inner={
        "attention_norm": "attn_norm",
        "attention.q": "attn.q_proj",
        "attention.k": "attn.k_proj",
        "attention.v": "attn.v_proj",
        "attention.out": "attn.o_proj",
        "mlp_norm": "mlp_norm",
        "mlp.up": "mlp.w1",
        "mlp.gate": "mlp.w2",
        "mlp.down": "mlp.w3",
    },
)


@dataclass(frozen=True)
class Family:
    """The checkpoints of a `model_type`: what they hold, and what they do not say."""

    model_type: str
    remote_code: str | None = None
    """Part of the name of the code that its `architectures` or `auto_map` name: tells it from others of the type."""
    qkv_bias: bool = False
    qk_norm: bool = False
    names: TensorNames = LLAMA_NAMES
    keys: Mapping[str, str] = field(default_factory=dict)
    """Its keys in `config.json`, by Llama's, where they differ."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values, by Llama's keys, of what is missing in `config.json`."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """The values of its own keys that our transformer can be; null, or no such key, is the first."""
    alignment: Literal["same", "next"] | None = None
    """None: a causal model, or one whose `config.json` says otherwise."""
    block_size: int | None = None
    """S where `config.json` says nothing; None: every position sees all others."""
    mask_id: int | None = None
    """The mask where neither `config.json` nor the tokenizer names one."""
    eos_ids: tuple[int, ...] = ()
    has_head_dim: bool = True
    """False: its code knows heads of width / heads alone."""

    architecture: str | None = None
    """The class whose weights they are, in checkpoints that we write."""
    code: Mapping[str, str] = field(default_factory=dict)
    """Its `auto_map` there: the code of the originals on the Hub. Default: transformers has the class."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """What `config.json` says there whatever the model is, beside the first values of `only`."""

    @property
    def is_fixed(self) -> bool:
        """True if its checkpoints are all read at one alignment, and with or without blocks; False: they say so."""
        return self.alignment is not None


_GROUPED = {"num_key_value_heads": 32}
_QWEN3 = {**_GROUPED, "head_dim": 128}
_LLADA_KEYS = {
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "vocab_size": "embedding_size",
    "tie_word_embeddings": "weight_tying",
    "hidden_act": "activation_type",
    "max_position_embeddings": "max_sequence_length",
}
_LLADA_ONLY: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "block_group_size": (1,),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
    "include_bias": (False,),
    "include_qkv_bias": (False,),
    "bias_for_layer_norm": (False,),
}


def _code(repository: str, module: str, config: str, **models: str) -> dict[str, str]:
    """Returns the `auto_map` of the classes that a repository of the Hub has the code of, by transformers' names."""
    classes = {"AutoConfig": f"configuration_{module}.{config}"}
    classes |= {auto: f"modeling_{module}.{name}" for auto, name in models.items()}
    return {auto: f"{repository}--{name}" for auto, name in classes.items()}


FAMILIES = {
    "llama": Family("llama", architecture="LlamaForCausalLM"),
    "qwen2": Family("qwen2", qkv_bias=True, defaults=_GROUPED, architecture="Qwen2ForCausalLM"),
    "qwen3": Family("qwen3", qk_norm=True, defaults=_QWEN3, architecture="Qwen3ForCausalLM"),
    "stable-diffcoder": Family(
        "llama", remote_code="diffcoder", alignment="same", block_size=4, mask_id=5, eos_ids=(2,)
    ),
    "a2d-llama": Family("a2d-llama", alignment="same"),
    "a2d-qwen2": Family("a2d-qwen2", qkv_bias=True, defaults=_GROUPED, alignment="same"),
    "a2d-qwen3": Family("a2d-qwen3", qk_norm=True, defaults=_QWEN3, alignment="same"),
    "sdar": Family(
        "sdar",
        qk_norm=True,
        defaults=_QWEN3,
        alignment="same",
        block_size=4,
        mask_id=151669,
        eos_ids=(151645, 151643),
        architecture="SDARForCausalLM",
        code=_code("JetLM/SDAR-4B-Chat", "sdar", "SDARConfig", AutoModelForCausalLM="SDARForCausalLM"),
        constants={"fuse_cross_entropy": True, "use_sliding_window": False, "sliding_window": None},
    ),
    "Fast_dLLM_Qwen": Family(
        "Fast_dLLM_Qwen",
        qkv_bias=True,
        keys={"block_size": "bd_size"},
        defaults=_GROUPED,
        alignment="next",
        block_size=32,
        mask_id=151665,
        eos_ids=(151645,),
    ),
    "Dream": Family(
        "Dream",
        qkv_bias=True,
        defaults=_GROUPED,
        alignment="next",
        mask_id=151666,
        eos_ids=(151643,),
        has_head_dim=False,
        architecture="DreamModel",
        code=_code("Dream-org/Dream-v0-Instruct-7B", "dream", "DreamConfig", AutoModel="DreamModel"),
    ),
    "llada": Family(
        "llada",
        names=LLADA_NAMES,
        keys=_LLADA_KEYS,
        defaults={"rms_norm_eps": 1e-5},
        only=_LLADA_ONLY,
        alignment="same",
        mask_id=126336,
        eos_ids=(126081,),
        has_head_dim=False,
        architecture="LLaDAModelLM",
        code=_code(
            "GSAI-ML/LLaDA-8B-Instruct",
            "llada",
            "LLaDAConfig",
            AutoModel="LLaDAModelLM",
            AutoModelForCausalLM="LLaDAModelLM",
        ),
        constants=dict.fromkeys(("attention_dropout", "embedding_dropout", "residual_dropout"), 0.0),
    ),
}


@dataclass(frozen=True)
class Layout:
    """A kind of Hugging Face folder that a model can be written as."""

    families: tuple[str, ...]
    """Names in `FAMILIES`, of which the model must be one."""
    title: str
    """The models that it is the layout of."""
    said: str = ""
    """What users are told of it; default: that of the models as they are published."""

    @property
    def about(self) -> str:
        return self.said or f"as {self.title} is published"


OURS = "unmask"
"""The layout of this package's exports, which any model has."""
LAYOUTS = {
    "plain": Layout(
        ("llama", "qwen2", "qwen3"), "Llama and Qwen", "Llama, Qwen2 or Qwen3, which transformers (>= 5.2) loads"
    ),
    "sdar": Layout(("sdar",), "SDAR"),
    "dream": Layout(("Dream",), "Dream"),
    "llada": Layout(("llada",), "LLaDA"),
}

_MOE = "a mixture of experts, which our dense transformer is not"
_ENCODER = "an encoder with LayerNorm, GELU and an output layer of its own, which our transformer is not"
_DIT = "a DiT, with adaptive LayerNorm and fused projections, which our transformer is not"
REFUSED = {
    "llada2_moe": _MOE,
    "lladamoe": _MOE,
    "llada_moe": _MOE,
    "sdar_moe": _MOE,
    "qwen2_moe": _MOE,
    "qwen3_moe": _MOE,
    "mixtral": _MOE,
    "nemotron_labs_diffusion": "a Ministral with YaRN positions and scaled queries, which ours does not have",
    "mdlm": _DIT,
    "bd3lm": _DIT,
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "modernbert": _ENCODER,
}
"""Why models of these types are not read."""


def find_family(given: Mapping[str, Any], where: str) -> str:
    """Returns the name of the family of the `config.json` with the content `given`.

    Raises:
        UserError: there is none; the message begins with `where`.
    """
    kind = given.get("model_type")
    known = ", ".join(dict.fromkeys(family.model_type for family in FAMILIES.values()))
    if isinstance(kind, str) and kind in REFUSED:
        raise UserError(f"{where}: model_type={kind!r} is {REFUSED[kind]}; use a checkpoint of {known}")
    names = [name for name, family in FAMILIES.items() if family.model_type == kind]
    if not names:
        raise UserError(f"{where}: model_type={kind!r} is unknown; use a checkpoint of {known}")
    code = _code_names(given)
    special = [name for name in names if FAMILIES[name].remote_code and str(FAMILIES[name].remote_code) in code]
    return [*special, *names][0]


def _code_names(given: Mapping[str, Any]) -> str:
    """Joins, in lower case, what `config.json` calls its code."""
    architectures, auto_map = given.get("architectures"), given.get("auto_map")
    listed = architectures if isinstance(architectures, list) else []
    mapped = auto_map.values() if isinstance(auto_map, dict) else []
    return " ".join(map(str, [*listed, *mapped])).lower()
