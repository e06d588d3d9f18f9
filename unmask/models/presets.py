"""Named sizes of the transformer. Settings given beside `model.preset` override the preset's."""

import difflib
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Seconds on one core: for tests and the debug recipe.
    "tiny": {"dim": 32, "ff_dim": 64, "num_layers": 2, "num_heads": 2, "learned_positions": True, "rotary": False},
    # Minutes on a CPU: learned positions say which cell is meant, so no layer need count along a row.
    "sudoku-1m": {
        "dim": 128,
        "ff_dim": 384,
        "num_layers": 6,
        "num_heads": 4,
        "learned_positions": True,
        "rotary": False,
    },
    # The PUMA paper's Sudoku model: 6.8M parameters.
    "sudoku-6m": {"dim": 256, "ff_dim": 768, "num_layers": 8, "num_heads": 8},
    # The autoregressive models that 2502.06768 compares a 6M MDM with (Shah et al. 2024): 42.5M parameters. Theirs have
    # a GELU's 2 matrices of inner width 3456; a SwiGLU's 3 of 2304 are as many weights.
    "sudoku-42m": {"dim": 576, "ff_dim": 2304, "num_layers": 8, "num_heads": 8},
    # TinyGSM on a CPU: 1.3M parameters, and the embedding of the tokens that the data use.
    "tinygsm-small": {"dim": 128, "ff_dim": 384, "num_layers": 6, "num_heads": 4, "qkv_bias": True, "tied_head": True},
    # The PUMA paper's TinyGSM model, in the manner of Qwen2: 125.4M parameters, 77.6M of them the embedding.
    "tinygsm-125m": {
        "dim": 512,
        "ff_dim": 1536,
        "num_layers": 14,
        "num_heads": 8,
        "qkv_bias": True,
        "tied_head": True,
    },
    # Text as bytes on a CPU: 1.3M parameters.
    "text-small": {"dim": 128, "ff_dim": 384, "num_layers": 6, "num_heads": 4, "tied_head": True},
    # As wide and deep as GPT-2's smallest and MDLM's: 113.3M parameters, and embedding and head.
    "text-110m": {"dim": 768, "ff_dim": 2048, "num_layers": 12, "num_heads": 12},
    # LLaDA-8B (2502.09992): 6.98B parameters, and 1.04B in embedding and head.
    "llada-8b": {
        "dim": 4096,
        "ff_dim": 12288,
        "num_layers": 32,
        "num_heads": 32,
        "rope_theta": 500_000.0,
        "norm_eps": 1e-5,
    },
    # Dream-7B, Dream-Coder and DiffuCoder, in the manner of Qwen2: 6.53B parameters, and 1.09B in embedding and head.
    "dream-7b": {
        "dim": 3584,
        "ff_dim": 18944,
        "num_layers": 28,
        "num_heads": 28,
        "num_kv_heads": 4,
        "qkv_bias": True,
        "rope_theta": 1_000_000.0,
        "alignment": "next",
    },
}


def find_preset(name: str) -> dict[str, Any]:
    """Returns the settings of the preset `name`.

    Raises:
        ValueError: there is none; the message has the nearest.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.3)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"model.preset={name}: unknown; {hint}Presets: {', '.join(PRESETS)}")
    return PRESETS[name]
