"""Writes our transformer as transformers' own Llama, Qwen2 or Qwen3: the inverse of `models/hf.py` and `hf_weights.py`.

With `"is_causal": false` in `config.json`, transformers from 5.2 on lets every position see all others, without code of
ours. Dimensions: V tokens, D width.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.models.families import FAMILIES
from unmask.models.transformer import TransformerConfig
from unmask.types import TokenSpec

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Names of transformers' classes, by family."""


def plain_family(config: object, where: str) -> str:
    """Returns the family, a key of `CLASSES`, that a model with the settings `config` is.

    Raises:
        UserError: it is none; names every setting that is in the way.
    """
    if not isinstance(config, TransformerConfig):
        name = getattr(config, "name", type(config).__name__)
        raise UserError(f"{where}: model.name={name} is no class of transformers; export it with --layout unmask")
    if problems := [*_problems(config)]:
        raise UserError(f"{where}: {'; '.join(problems)}; export it with --layout unmask")
    return next(
        name
        for name in CLASSES
        if (FAMILIES[name].qkv_bias, FAMILIES[name].qk_norm) == (config.qkv_bias, config.qk_norm)
    )


def _problems(config: TransformerConfig) -> Iterator[str]:
    if config.learned_positions:
        yield "model.learned_positions=true: Llama and Qwen know positions by rotation alone"
    if not config.rotary:
        yield "model.rotary=false: Llama and Qwen rotate queries and keys"
    if config.out_bias:
        yield "model.out_bias=true: the projection after attention has no bias there"
    if config.qkv_bias and config.qk_norm:
        yield "model.qkv_bias=true and model.qk_norm=true: Qwen2 has the biases, Qwen3 the norms, no class both"
    if config.self_conditioning:
        yield "model.self_conditioning=true: no class there reads an earlier prediction"
    if config.loops is not None:
        yield "model.loops: every layer runs once there"
    if config.lora is not None:
        yield "model.lora: its adapters are not merged"


def plain_settings(config: TransformerConfig, tokens: TokenSpec, family: str, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the content of `config.json`.

    `alignment`, `block_size` and `mask_token_id` are for those who decode: transformers keeps them, and uses none. A
    causal model has none of them.
    """
    settings: dict[str, Any] = {
        "architectures": [CLASSES[family]],
        "model_type": FAMILIES[family].model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": num_rows(config, tokens),
        "hidden_size": config.dim,
        "intermediate_size": config.ff_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": tokens.length,
        "tie_word_embeddings": config.tied_head,
        "use_cache": config.causal,
        "bos_token_id": None,
        "eos_token_id": tokens.eos_id,
        "pad_token_id": tokens.pad_id,
    }
    if not config.causal:
        settings |= {"is_causal": False, "alignment": config.alignment, "mask_token_id": tokens.mask_id}
        settings |= {} if config.block_size is None else {"block_size": config.block_size}
    return settings


def num_rows(config: TransformerConfig, tokens: TokenSpec) -> int:
    """Counts the rows to write: V, without the mask where it comes last and the model is causal, so never reads it."""
    return tokens.vocab_size - (config.causal and tokens.mask_id == tokens.vocab_size - 1)


def plain_tensors(
    state: Mapping[str, Tensor], config: TransformerConfig, tokens: TokenSpec, family: str
) -> dict[str, Tensor]:
    """Returns the tensors of `Denoiser.state_dict()` under the family's names: in bf16 if all are, else in fp32."""
    names = FAMILIES[family].names
    dtype = torch.bfloat16 if all(value.dtype == torch.bfloat16 for value in state.values()) else torch.float32
    written = {}
    for name, value in state.items():
        ours = name.removeprefix("backbone.")
        rows = value[: num_rows(config, tokens)] if ours in ("embedding.weight", "head.weight") else value
        written[names.theirs(ours)] = rows.to(dtype).contiguous()
    return written
