"""AdamW, its learning rate schedule, and its state by parameter name."""

import math
from typing import Any

import torch
from torch import nn

from unmask.config.run import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Builds AdamW, with weight decay on matrices only (not on norms and biases)."""
    # Fused: one kernel for all parameters, and the one that reads `found_inf` (`Trainer._update`).
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Returns the rate of `step` (from 0) out of `num_steps`: linear warm-up, then constant or a half cosine to 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _names_in_order(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Returns parameter names in the order in which the optimizer numbers them."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return [name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Returns `{parameter name: {"exp_avg": .., "exp_avg_sq": .., "step": ..}}`."""
    # By name, not number: numbers change with the order of the groups. Learning rate and betas are the configuration's.
    names = _names_in_order(optimizer, model)
    return {names[number]: dict(values) for number, values in optimizer.state_dict()["state"].items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, Any]) -> None:
    """Restores what `optimizer_state` returned."""
    names = _names_in_order(optimizer, model)
    numbered = {number: state[name] for number, name in enumerate(names) if name in state}
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})
