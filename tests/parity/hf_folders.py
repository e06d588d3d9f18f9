"""Tiny random checkpoints of each family, in its own layout, and the model of transformers that they are."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

ROWS, MASK, EOS = 50, 48, 2
SIZES = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Sizes that fit a Llama, a Qwen2 and a Qwen3."""
_LLAMA = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "eos_token_id": EOS,
}
_LLADA = {
    "d_model": 32,
    "mlp_hidden_size": 48,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 4,
    "max_sequence_length": 64,
    "rms_norm_eps": 1e-5,
    "activation_type": "silu",
    "rope_theta": 500_000.0,
    "embedding_size": ROWS,
    "vocab_size": ROWS - 2,
    "weight_tying": False,
    "block_type": "llama",
    "block_group_size": 1,
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "eos_token_id": EOS,
}


@dataclass(frozen=True)
class Kind:
    """A family's folder: the class of transformers with its weights, and what its own files say."""

    base: str
    config: dict[str, Any]
    alignment: str | None = "same"
    block_size: int | None = None
    mask: int | None = MASK
    base_settings: dict[str, Any] = field(default_factory=dict)


def _own(model_type: str, **changes: object) -> dict[str, Any]:
    return {**_LLAMA, "model_type": model_type, **changes}


_DIFFCODER = {"AutoModelForCausalLM": "modeling_seed_diffcoder.SeedDiffcoderForCausalLM"}
KINDS = {
    "llama": Kind("Llama", _own("llama", mask_token_id=MASK, is_causal=False)),
    "qwen2": Kind("Qwen2", _own("qwen2", mask_token_id=MASK, is_causal=False, alignment="next"), "next"),
    "qwen3": Kind("Qwen3", _own("qwen3", mask_token_id=MASK, is_causal=False, head_dim=12)),
    "stable-diffcoder": Kind("Llama", _own("llama", auto_map=_DIFFCODER), block_size=4, mask=5),
    "a2d-llama": Kind("Llama", _own("a2d-llama", mask_token_id=MASK)),
    "a2d-qwen2": Kind("Qwen2", _own("a2d-qwen2", mask_token_id=MASK, tie_word_embeddings=True)),
    "a2d-qwen3": Kind("Qwen3", _own("a2d-qwen3", mask_token_id=MASK, tie_word_embeddings=True, head_dim=12)),
    "sdar": Kind("Qwen3", _own("sdar", mask_token_id=MASK, head_dim=12), block_size=4),
    "sdar, b8": Kind("Qwen3", _own("sdar", mask_token_id=MASK, head_dim=8, block_size=8), block_size=8),
    "Fast_dLLM_Qwen": Kind("Qwen2", _own("Fast_dLLM_Qwen", mask_token_id=MASK, bd_size=8), "next", 8),
    "Dream": Kind("Qwen2", _own("Dream", mask_token_id=MASK, rope_theta=1e6), "next"),
    "llada": Kind(
        "Llama",
        {"model_type": "llada", "mask_token_id": MASK, **_LLADA},
        base_settings={"rope_theta": 5e5, "num_key_value_heads": 4},
    ),
    "llada, tied": Kind(
        "Llama",
        {"model_type": "llada", "mask_token_id": MASK, **_LLADA, "weight_tying": True, "n_kv_heads": 2},
        base_settings={"rope_theta": 5e5, "tie_word_embeddings": True},
    ),
}
_LLADA_PARTS = {  # as LLaDA's own code calls them
    "model.embed_tokens.": "model.transformer.wte.",
    "model.norm.": "model.transformer.ln_f.",
    "lm_head.": "model.transformer.ff_out.",
    "model.layers.": "model.transformer.blocks.",
    ".self_attn.o_proj.": ".attn_out.",
    ".self_attn.": ".",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".ff_norm.",
    ".mlp.gate_proj.": ".ff_proj.",
    ".mlp.up_proj.": ".up_proj.",
    ".mlp.down_proj.": ".ff_out.",
}


def reference(name: str) -> Any:
    """The model of transformers with the weights of `write(folder, name)`; every parameter of it matters."""
    transformers = pytest.importorskip("transformers")
    kind = KINDS[name]
    model_class = getattr(transformers, f"{kind.base}ForCausalLM")
    known = {
        key: value
        for key, value in kind.config.items()
        if key in {*_LLAMA, "head_dim", "rope_theta", "tie_word_embeddings"}
    }
    settings = {**_LLAMA, **known, "vocab_size": ROWS, **kind.base_settings}
    return random_model(model_class, model_class.config_class(**settings))


def random_model(model_class: Any, config: Any) -> Any:
    """Makes a model of transformers whose every parameter matters: biases are not 0, norms not 1."""
    model = model_class._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(noise * scale + (parameter.ndim == 1 and not key.endswith("bias")))
    return model


def write(folder: Path, name: str, *, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """Writes the checkpoint as its family's code does; `changes` are of its `config.json` (None: no such key)."""
    model = reference(name)
    tensors = {key: value.to(dtype).contiguous() for key, value in model.named_parameters()}
    if KINDS[name].config["model_type"] == "llada":
        tensors = {_llada(key): value for key, value in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach() for key, value in tensors.items()}, folder / "model.safetensors")
    config = {key: value for key, value in {**KINDS[name].config, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _llada(key: str) -> str:
    for theirs, own in _LLADA_PARTS.items():
        key = key.replace(theirs, own)
    return key


def reference_logits(name: str, ids: Tensor) -> Tensor:
    """(B, L) -> (B, L, R): the logits that the family gives for each position."""
    size = KINDS[name].block_size or ids.shape[1]
    block = torch.arange(ids.shape[1]) // size
    hidden = torch.where(block[:, None] >= block, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        found = reference(name)(ids, attention_mask=hidden.expand(len(ids), 1, -1, -1)).logits
    return found if KINDS[name].alignment == "same" else found.roll(1, dims=1)


def write_tokenizer(folder: Path, *, mask: str | None = "<|mask|>", size: int = ROWS) -> Path:
    """Writes a tokenizer of single letters and special tokens: the end is `EOS`, the mask `MASK`."""
    from tokenizers import AddedToken, Tokenizer, models

    letters = [chr(ord("A") + i) if i < 26 else chr(ord("a") + i - 26) for i in range(size)]
    letters[0], letters[EOS] = "?", "<end>"
    if mask is not None and size > MASK:
        letters[MASK] = mask
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[], unk_token="?"))
    special = ["<end>"] + ([mask] if mask in letters else [])
    tokenizer.add_special_tokens([AddedToken(each, normalized=False) for each in special if each])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return folder
