"""Writes our transformer in a layout of Hugging Face: the inverse of `models/hf.py` and `models/hf_weights.py`.

Names, keys and what a layout can express are the rows of `models/families.py` that reading uses too.
Dimensions: V tokens, D width.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.models.families import BY_TOKEN, FAMILIES, LAYOUTS, Family, Layout
from unmask.models.on_demand import OnDemand, outline, outlines_of
from unmask.models.transformer_config import TransformerConfig
from unmask.types import TokenSpec


def choose_family(config: object, layout: str, where: str) -> str:
    """Returns the name of the family, of those of `layout`, that a model with the settings `config` is.

    Raises:
        UserError: it is none; the message begins with `where`, and names every setting that is in the way.
    """
    chosen = LAYOUTS[layout]
    fix = "export it with --layout unmask"
    if not isinstance(config, TransformerConfig):
        name = getattr(config, "name", type(config).__name__)
        raise UserError(f"{where}: model.name={name} is no model of the layout {layout}; {fix}")
    problems = [*_problems(config, chosen)]
    found = next((name for name in chosen.families if _options(FAMILIES[name]) == _options(config)), None)
    if found is None and len(chosen.families) > 1:
        problems.append("model.qkv_bias=true and model.qk_norm=true: Qwen2 has those, Qwen3 these, no class both")
    if found is None or problems:
        is_plain = layout != "plain" and not [*_problems(config, LAYOUTS["plain"])]
        raise UserError(f"{where}: {'; '.join(problems)}; {fix}{' or --layout plain' if is_plain else ''}")
    return found


def needs_our_code(config: object) -> str | None:
    """Returns why the code that we write beside an export cannot run this model; None if it can."""
    if not isinstance(config, TransformerConfig):
        return f"model.name={getattr(config, 'name', type(config).__name__)} is a network of your own"
    if config.self_conditioning:
        return "model.self_conditioning=true reads an earlier prediction"
    return None


def _options(of: Family | TransformerConfig) -> tuple[bool, bool]:
    return of.qkv_bias, of.qk_norm


def _problems(config: TransformerConfig, layout: Layout) -> Iterator[str]:
    """Yields the settings that a layout cannot express, each with the reason."""
    title, families = layout.title, [FAMILIES[name] for name in layout.families]
    if config.learned_positions:
        yield "model.learned_positions=true: positions are known by rotation alone there"
    if not config.rotary:
        yield "model.rotary=false: queries and keys are rotated there"
    if config.rotary_layout != "standard":
        yield f"model.rotary_layout={config.rotary_layout}: a pair of channels turns by one angle there"
    if config.out_bias:
        yield "model.out_bias=true: the projection after attention has no bias there"
    if config.self_conditioning:
        yield "model.self_conditioning=true: no class there reads an earlier prediction"
    if config.loops is not None:
        yield "model.loops: every layer runs once there"
    if config.lora is not None:
        yield "model.lora: its adapters are not merged"
    if config.qkv_bias not in (each.qkv_bias for each in families):
        has = "no biases" if config.qkv_bias else "biases always"
        yield f"model.qkv_bias={str(config.qkv_bias).lower()}: queries, keys and values have {has} there"
    if config.qk_norm not in (each.qk_norm for each in families):
        has = "not normalised" if config.qk_norm else "always normalised, which weights of 1 do too,"
        yield f"model.qk_norm={str(config.qk_norm).lower()}: queries and keys are {has} there"
    yield from (problem for each in families for problem in _fixed(config, each, title))


def _fixed(config: TransformerConfig, family: Family, title: str) -> Iterator[str]:
    """Yields what the checkpoints of a family cannot say of themselves."""
    if not family.is_fixed:
        return
    if config.causal:
        yield f"model.causal=true: {title} fill in masks, and see later positions"
    elif config.alignment != family.alignment:
        place = "i - 1" if family.alignment == "next" else "i"
        yield f"model.alignment={config.alignment}: position i is read at {place} there"
    if config.block_size is not None and family.block_size is None:
        yield f"model.block_size={config.block_size}: every position sees all others there"
    if config.block_size is None and family.block_size is not None and not config.causal:
        yield "model.block_size=null: a position sees its block and those before it there; train with blocks"
    if not family.has_head_dim and config.head_width * config.num_heads != config.dim:
        yield f"model.head_dim={config.head_width}: a head has {config.dim / config.num_heads:g} there, dim / num_heads"


def hf_settings(config: TransformerConfig, tokens: TokenSpec, family_name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the content of `config.json`, in the family's own keys.

    In a plain folder `alignment`, `block_size` and `mask_token_id` are for those who decode: transformers keeps them,
    and uses none. A causal model has none of them.
    """
    family = FAMILIES[family_name]
    settings: dict[str, Any] = {
        "vocab_size": num_rows(config, tokens),
        "hidden_size": config.dim,
        "intermediate_size": config.ff_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.key_heads,
        **({"head_dim": config.head_width} if family.has_head_dim else {}),
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
        settings |= {} if family.is_fixed else {"is_causal": False, "alignment": config.alignment}
        settings |= {} if config.block_size is None else {"block_size": config.block_size}
        settings |= {"mask_token_id": tokens.mask_id}
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": name,
        **({"auto_map": dict(family.code), "torch_dtype": name} if family.code else {}),  # as transformers 4 reads it
        **{key: accepted[0] for key, accepted in family.only.items()},
        **family.constants,
        **({"vocab_size": settings["vocab_size"]} if "vocab_size" in family.keys else {}),  # it counts tokens and rows
        **{family.keys.get(key, key): value for key, value in settings.items()},
    }


def num_rows(config: TransformerConfig, tokens: TokenSpec) -> int:
    """Counts the rows to write: V, without the mask where it comes last and the model is causal, so never reads it."""
    return tokens.vocab_size - (config.causal and tokens.mask_id == tokens.vocab_size - 1)


def hf_tensors(
    state: Mapping[str, Tensor], config: TransformerConfig, tokens: TokenSpec, family: str, *, has_mask_row: bool
) -> OnDemand:
    """Returns the tensors of `Denoiser.state_dict()` under the family's names: in bf16 if all are, else in fp32.

    Each is made when it is asked for, in the order of `state`.

    The mask has probability 0 here, and no gradient reaches its row of an untied head. Elsewhere its logit counts. So
    where the row was never learned it is written as the mean of the others: then its logit is their mean, which is not
    the largest, and its probability at most 1 / V.

    Args:
        has_mask_row: True if the head's row of the mask comes from a checkpoint, and is written as it is.
    """
    given = outlines_of(state)
    dtype = torch.bfloat16 if all(each.dtype == torch.bfloat16 for each in given.values()) else torch.float32
    count, mask_id = num_rows(config, tokens), tokens.mask_id
    sources: dict[str, str] = {}
    outlines = {}
    for name, value in given.items():
        ours = name.removeprefix("backbone.")
        theirs = FAMILIES[family].names.theirs(ours)
        shape = torch.Size([count, *value.shape[1:]]) if ours in BY_TOKEN else value.shape
        sources[theirs], outlines[theirs] = name, outline(shape, dtype)

    def written(theirs: str) -> Tensor:
        name = sources[theirs]
        rows = state[name][: len(outlines[theirs])].to(dtype)
        if name == "backbone.head.weight" and mask_id < count and not has_mask_row:
            own = rows[mask_id].float()
            rows = rows.clone()
            rows[mask_id] = ((rows.sum(dim=0, dtype=torch.float32) - own) / (count - 1)).to(dtype)
        return rows

    return OnDemand(outlines, written)
