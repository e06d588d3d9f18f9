"""Builds a denoiser from its configuration, and fills one with weights that are read."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from unmask.blocks import check_block_size
from unmask.config import registry
from unmask.config.settings import Section, name_of
from unmask.errors import UserError
from unmask.masking.process import Requirements
from unmask.models.cost import require_memory_for_model, require_memory_for_weights
from unmask.models.denoiser import Backbone, Denoiser
from unmask.models.lora import add_adapters
from unmask.models.transformer import Transformer
from unmask.types import TokenSpec


def build_denoiser(
    config: Section,
    tokens: TokenSpec,
    *,
    requirements: Requirements | None = None,
    seed: int = 0,
    dtype: str = "float32",
    device: torch.device | None = None,
    is_empty: bool = False,
) -> Denoiser:
    """Builds a denoiser for `tokens` around the network `config.name`, with initial weights drawn from `seed`.

    Weights that the network has no `init_weights(seed)` for start as those of PyTorch's layers do. What is read later
    is not drawn: the transformer's frozen weights under `lora` are on the meta device until `lora.load_base`.

    Args:
        config: the section `model`.
        tokens: its tokens.
        requirements: of the process that trains it.
        seed: keys the initial weights, and the noise that the model draws in training.
        dtype: number format, as in `Denoiser.use_dtype`.
        device: where it goes.
        is_empty: leave all of the transformer's weights on the meta device, for `fill`. Other networks draw theirs.

    Raises:
        UserError: it cannot be trained by a process of these `requirements`, has blocks that do not fill a row, or
            needs more memory than there is.
    """
    name = name_of(config)
    adapters = getattr(config, "lora", None)
    if adapters is not None and adapters.base == "nf4" and device is not None and device.type == "mps":
        raise UserError(
            "model.lora.base=nf4: bitsandbytes does not compute on a Mac's GPU; use bfloat16, or train.device=cpu"
        )
    is_read = (is_empty or adapters is not None) and registry.resolve("model", name) is Transformer
    if not is_empty:
        require_memory_for_model(config, tokens, device=device)
    # PyTorch's layers draw from the global generator; the fork leaves the caller's as it was.
    with torch.random.fork_rng(devices=[]), torch.device("meta") if is_read else nullcontext():
        torch.manual_seed(seed)
        backbone: Any = registry.build("model", name, config, tokens)
    registry.require_parts("model", name, backbone, Backbone)
    if not isinstance(backbone, nn.Module) or type(backbone).forward is nn.Module.forward:
        raise UserError(f"model.name={name}: is not a model: it is no nn.Module with a method forward")
    draw: Any = getattr(backbone, "init_weights", None)
    if draw is not None and not is_read:
        with registry.foreign_code("model", name, "cannot draw its weights"):
            draw(seed)
    if adapters is not None:
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
    model.use_dtype(dtype)
    return model if is_empty and is_read else model.to(device)


@torch.no_grad()
def fill(model: Denoiser, tensors: Mapping[str, Tensor], device: torch.device) -> Denoiser:
    """Sets the weights of a model that was built empty, and moves it to `device`.

    Each is read, in the order of their names, converted to the model's format and moved before the next one, so that
    there never are two copies.

    Args:
        model: as `build_denoiser` returned it, or in another format since.
        tensors: its state.
        device: where it goes.

    Raises:
        UserError: it needs more memory than there is on `device`.
    """
    if not isinstance(model.backbone, Transformer):
        model.load_state_dict(dict(tensors))
        return model.to(device)
    weights = dict(model.named_parameters())
    require_memory_for_weights(weights.values(), device)
    for name, empty in sorted(weights.items()):
        path, _, key = name.rpartition(".")
        read = torch.empty_like(empty, device=device).copy_(tensors[name])
        setattr(model.get_submodule(path), key, nn.Parameter(read, requires_grad=empty.requires_grad))
    return model.to(device)


def _check(model: Denoiser, requirements: Requirements) -> None:
    if requirements.is_causal != model.is_causal:
        what, settings = ("a causal", "true") if requirements.is_causal else ("no causal", "false")
        raise UserError(
            f"model.causal={model.is_causal}: this process trains {what} model; set model.causal={settings}"
        )
    if requirements.block_size != model.block_size:
        needed, own = ("null" if size is None else size for size in (requirements.block_size, model.block_size))
        raise UserError(f"process.block_size={needed}, model.block_size={own}: set both to the same size, or to null")
