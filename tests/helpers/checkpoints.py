"""Random Llamas in Hugging Face's layout, as they are without transformers."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from unmask.models.build import build_denoiser
from unmask.models.families import LLAMA_NAMES
from unmask.models.transformer_config import TransformerConfig
from unmask.types import TokenSpec


def write_llama(
    folder: Path,
    *,
    rows: int,
    dtype: torch.dtype = torch.float32,
    num_layers: int = 2,
    tied: bool = True,
    **described: object,
) -> Path:
    """Writes `model.safetensors` and a `config.json` that also says what is `described`."""
    sizes = {"dim": 32, "ff_dim": 48, "num_layers": num_layers, "num_heads": 4, "num_kv_heads": 2}
    tokens = TokenSpec(vocab_size=rows, length=4, mask_id=0)
    weights = build_denoiser(TransformerConfig(**sizes, tied_head=tied), tokens, seed=3).backbone.state_dict()
    folder.mkdir()
    theirs = {LLAMA_NAMES.theirs(name): value.to(dtype) for name, value in weights.items()}
    save_file(theirs, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "vocab_size": rows, "hidden_size": 32, "intermediate_size": 48}
    config |= {"num_hidden_layers": num_layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"rms_norm_eps": 1e-6, "tie_word_embeddings": tied, "is_causal": False}
    config |= {"architectures": ["LlamaForCausalLM"], **described}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
