"""From a configuration to a denoiser, and to weights on disk and back."""

from typing import Any

import torch

from unmask.config import Section, name_of
from unmask.errors import UserError
from unmask.masking.process import Requirements
from unmask.models.denoiser import Denoiser
from unmask.models.precision import parameter_dtype
from unmask.registry import resolve
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
    """A freshly initialised denoiser for `tokens`, of the network that `config.name` stands for."""
    backbone: Any = resolve("model", name_of(config)).from_config(config, tokens)
    backbone.init_weights(seed)
    model = Denoiser(
        backbone,
        mask_id=tokens.mask_id,
        confidence=(requirements or Requirements()).confidence or "prob",
        alignment=getattr(config, "alignment", "same"),
    )
    if requirements is not None and requirements.is_causal != model.is_causal:
        what, settings = ("a causal", "true") if requirements.is_causal else ("no causal", "false")
        raise UserError(
            f"model.causal={model.is_causal}: this process trains {what} model; set model.causal={settings}"
        )
    return model.to(device=device, dtype=parameter_dtype(dtype))
