"""Builds a denoiser from its configuration."""

from typing import Any

import torch
from torch import nn

from unmask.blocks import check_block_size
from unmask.config import registry
from unmask.config.settings import Section, name_of
from unmask.errors import UserError
from unmask.masking.process import Requirements
from unmask.models.cost import require_memory_for_model
from unmask.models.denoiser import Backbone, Denoiser
from unmask.models.lora import add_adapters
from unmask.types import TokenSpec


def build_denoiser(
    config: Section,
    tokens: TokenSpec,
    *,
    requirements: Requirements | None = None,
    seed: int = 0,
    dtype: str = "float32",
    device: torch.device | None = None,
) -> Denoiser:
    """Builds a denoiser for `tokens` around the network `config.name`, with initial weights drawn from `seed`.

    Weights that the network has no `init_weights(seed)` for start as those of PyTorch's layers do.

    Raises:
        UserError: it cannot be trained by a process of these `requirements`, has blocks that do not fill a row, or
            needs more memory than there is.
    """
    require_memory_for_model(config, tokens, device=device)
    name = name_of(config)
    # PyTorch's layers draw from the global generator; the fork leaves the caller's as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone: Any = registry.build("model", name, config, tokens)
    registry.require_parts("model", name, backbone, Backbone)
    if not isinstance(backbone, nn.Module) or type(backbone).forward is nn.Module.forward:
        raise UserError(f"model.name={name}: is not a model: it is no nn.Module with a method forward")
    draw: Any = getattr(backbone, "init_weights", None)
    if draw is not None:
        with registry.foreign_code("model", name, "cannot draw its weights"):
            draw(seed)
    if (adapters := getattr(config, "lora", None)) is not None:
        add_adapters(backbone, adapters, mask_id=tokens.mask_id, seed=seed)
    model = Denoiser(
        backbone,
        mask_id=tokens.mask_id,
        confidence=(requirements or Requirements()).confidence or "prob",
        alignment=getattr(config, "alignment", "same"),
        seed=seed,
    )
    if model.block_size is not None:
        check_block_size(model.block_size, tokens.length, "model.block_size")
    if requirements is not None:
        _check(model, requirements)
    return model.use_dtype(dtype).to(device)


def _check(model: Denoiser, requirements: Requirements) -> None:
    if requirements.is_causal != model.is_causal:
        what, settings = ("a causal", "true") if requirements.is_causal else ("no causal", "false")
        raise UserError(
            f"model.causal={model.is_causal}: this process trains {what} model; set model.causal={settings}"
        )
    if requirements.block_size != model.block_size:
        needed, own = ("null" if size is None else size for size in (requirements.block_size, model.block_size))
        raise UserError(f"process.block_size={needed}, model.block_size={own}: set both to the same size, or to null")
