"""Files as the PUMA paper's code leaves them, made from a description of their layout; and its network, by formula.

The network: `emb`; for each of `layers`: `attn_norm`, `attn.{q,k,v,o}_proj` (with biases, unless `bias_qkv` is false),
`mlp_norm`, `mlp.w1`, `mlp.w2`, `mlp.w3`, where the inner layer is `w1(x) * silu(w2(x))`; `final_norm`; `lm_head`.
Channel c of a head of width E turns by `position * 10000^(-2 (c mod E/2) / E)`, with its neighbour: 2 e with 2 e + 1.
"""

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

MASK, EOS, VOCAB, LENGTH = 12, 11, 13, 24
MODEL = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "max_position": LENGTH,
    "rms_norm_eps": 1e-6,
    "dropout": 0.0,
    "tie_lm_head": False,
    "causal": False,
    "arm_init": "none",
}
_GRID = {"vocab_size": 11, "hidden_size": 256, "intermediate_size": 768, "num_layers": 8, "num_attention_heads": 8}
_GRID |= {"num_kv_heads": 8, "max_position": 162, "rms_norm_eps": 1e-6, "dropout": 0.0}
_QWEN = {"vocab_size": 151645, "hidden_size": 512, "intermediate_size": 1536, "num_layers": 14}
_QWEN |= {"num_attention_heads": 8, "num_kv_heads": 8, "max_position": 512, "rms_norm_eps": 1e-6, "dropout": 0.0}
_QWEN |= {"tie_lm_head": True, "causal": False, "arm_init": "none"}
_OPTIM = {"data_ratio": 1.0, "learning_rate": 3e-4, "weight_decay": 0.01, "max_grad_norm": 1.0, "batch_size": 32}
_OPTIM |= {"warmup_steps": 1000, "logging_steps": 100}
_WANDB = {"wandb": True, "project": "mdm-pretraining", "name": "puma", "entity": "you"}
_LOADING = {"per_gpu_batch_size": "${training.batch_size}", "cpus": 4}


def _sudoku(**training: Any) -> dict[str, Any]:
    more = {"num_epochs": 2, "eval_steps": 2000, "save_steps": 10000, "ema": None, "eos_id": None}
    sampling = {"temperature": 0.0, "confidence": ["top_k", "top_k_margin"], "unmasking_num": [1, 2, 3]}
    data = {"mask_id": 10, "dataset": "sudoku", "data_dir": "data/sudoku_new", "sudoku_type": "new"}
    return {
        "model": _GRID,
        "training": {**training, **_OPTIM, **more},
        "validation": {"val_dir": "data/sudoku_new", "ratio": 0.01, "sampling": sampling},
        "data": {**data, "val_ratio": 0.05, "seed": 2026, "mmap": False, "training": _LOADING},
        "wandb": _WANDB,
    }


def _tinygsm(epochs: int = 20, sampling: dict[str, Any] | None = None, **training: Any) -> dict[str, Any]:
    more = {"num_epochs": epochs, "eval_steps": 5000, "save_steps": 20000, "ema": 0.9999, "eos_id": 151643}
    draws = {"temperature": 0.0, "confidence": ["top_k"], "unmasking_num": [2, 3], **(sampling or {})}
    data = {"mask_id": 151644, "dataset": "tinygsm", "data_dir": "data/tiny_gsm", "val_ratio": 0.02, "seed": 2026}
    return {
        "model": _QWEN,
        "training": {**training, **_OPTIM, **more},
        "validation": {"val_dir": "none", "sampling": draws},
        "data": {**data, "training": _LOADING},
        "wandb": _WANDB,
    }


_COLLAPSE = {"strategy": "progressive", "mode": "confidence_collapse", "confidence_threshold": 0.9, "block_size": 256}
_FIRST_STEPS = range(30_000, 330_001, 30_000)
SETTINGS = {
    "sudoku_baseline": _sudoku(strategy="standard"),
    "sudoku_puma": _sudoku(strategy="progressive", confidence_threshold=0.9, mode="standard", K=8),
    "tinygsm_baseline": _tinygsm(strategy="standard"),
    "tinygsm_puma": _tinygsm(
        **_COLLAPSE, K=12, sampling={"eos_id": 151643}, k_schedule=[[12 + 3 * i, s] for i, s in enumerate(_FIRST_STEPS)]
    ),
    "tinygsm_block_baseline": _tinygsm(15, strategy="block", block_size=256),
    "tinygsm_block_puma": _tinygsm(**_COLLAPSE, K=5, k_schedule=[[5 + 3 * i, 30_000 * i] for i in range(13)]),
}
"""The settings of its six YAML files, by their names."""


def settings(model: dict[str, Any], strategy: str = "standard", **training: Any) -> dict[str, Any]:
    """Those of a tiny training on rows of ids."""
    more = {"mode": "standard", "K": 4, **training, "strategy": strategy}
    tree = {**SETTINGS["tinygsm_baseline"], "model": model}
    tree["data"] = {**tree["data"], "mask_id": MASK}
    tree["training"] = {**tree["training"], "eos_id": EOS, **more}
    return tree


def write_yaml(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def weights(model: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights in the order of its module; a tied head is one tensor under two names."""
    generator = torch.Generator().manual_seed(seed)
    d, ff, heads, kv = (
        model[f"{k}"] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_kv_heads")
    )
    width, has_bias = d // heads, model.get("bias_qkv", True)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    made = {"emb.weight": draw(model["vocab_size"], d, scale=0.2 if model.get("tie_lm_head") else 1.0)}
    sizes = {"q": (heads * width, d), "k": (kv * width, d), "v": (kv * width, d), "o": (d, heads * width)}
    for i in range(model["num_layers"]):
        made[f"layers.{i}.attn_norm.weight"] = 1 + draw(d, scale=0.2)
        for name, shape in sizes.items():
            made[f"layers.{i}.attn.{name}_proj.weight"] = draw(*shape, scale=2 * d**-0.5)
            if has_bias:
                made[f"layers.{i}.attn.{name}_proj.bias"] = draw(shape[0], scale=0.5)
        made[f"layers.{i}.mlp_norm.weight"] = 1 + draw(d, scale=0.2)
        for name, shape in {"w1": (ff, d), "w2": (ff, d), "w3": (d, ff)}.items():
            made[f"layers.{i}.mlp.{name}.weight"] = draw(*shape, scale=shape[1] ** -0.5)
    made["final_norm.weight"] = 1 + draw(d, scale=0.2)
    made["lm_head.weight"] = (
        made["emb.weight"] if model.get("tie_lm_head") else draw(model["vocab_size"], d, scale=d**-0.5)
    )
    return made


def _turn(x: Tensor) -> Tensor:
    """Of x (B, L, H, E)."""
    length, width = x.shape[1], x.shape[3]
    channel = torch.arange(width)
    angle = torch.arange(length).float()[:, None] / 10_000.0 ** (2 * (channel % (width // 2)) / width)  # in fp32
    partner = torch.where(channel % 2 == 0, -x[..., channel ^ 1], x[..., channel ^ 1])
    return (x * angle.cos()[None, :, None] + partner * angle.sin()[None, :, None]).to(x.dtype)


@torch.no_grad()
def logits(made: dict[str, Tensor], model: dict[str, Any], ids: Tensor) -> Tensor:
    """Its network's logits (B, L, V), by formula, in fp64."""
    w = {name: value.double() for name, value in made.items()}
    heads, kv, eps = model["num_attention_heads"], model["num_kv_heads"], model["rms_norm_eps"]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    x = w["emb.weight"][ids]
    for i in range(model["num_layers"]):
        h = norm(x, f"layers.{i}.attn_norm")
        q, k, v = (
            linear(h, f"layers.{i}.attn.{name}_proj").unflatten(-1, (n, -1))
            for name, n in zip("qkv", (heads, kv, kv), strict=True)
        )
        q, k = _turn(q), _turn(k).repeat_interleave(heads // kv, dim=2)
        score = torch.einsum("bihe,bjhe->bhij", q, k) / q.shape[-1] ** 0.5
        if model.get("causal"):
            score = score.masked_fill(torch.ones(score.shape[-2:]).triu(1).bool(), -torch.inf)
        mixed = torch.einsum("bhij,bjhe->bihe", score.softmax(-1), v.repeat_interleave(heads // kv, dim=2))
        x = x + linear(mixed.flatten(2), f"layers.{i}.attn.o_proj")
        h = norm(x, f"layers.{i}.mlp_norm")
        x = x + linear(linear(h, f"layers.{i}.mlp.w1") * F.silu(linear(h, f"layers.{i}.mlp.w2")), f"layers.{i}.mlp.w3")
    return norm(x, "final_norm") @ w["lm_head.weight"].T


def content(model: dict[str, Any], made: dict[str, Tensor], strategy: str = "standard", **more: Any) -> dict[str, Any]:
    """A checkpoint `step=N.pt`, before it is written."""
    rest = {"epoch": 0, "global_step": 20, "val_loss": 1.5, "is_ema_snapshot": False, "top_k_unmasking_2": 0.25}
    return {**rest, "model_state_dict": made, "config": settings(model, strategy), **more}


def averaged(made: dict[str, Tensor], model: dict[str, Any]) -> dict[str, Any]:
    """The average that a checkpoint keeps: without names, tied parameters once."""
    names = [name for name in made if not (name == "lm_head.weight" and model.get("tie_lm_head"))]
    return {"decay": 0.9999, "num_updates": 20, "shadow_params": [made[name] for name in names]}
