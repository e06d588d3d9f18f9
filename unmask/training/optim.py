"""AdamW or Muon, the learning rate's schedule, and the optimizer's state by parameter name."""

import math
from bisect import bisect_left
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from unmask.config.run import OptimConfig
from unmask.errors import UserError, require
from unmask.models.attention import Attention
from unmask.training.muon import Muon

_LARGEST_RATE = 1e30
"""Muon's, for a matrix: float32 holds it times the scale of any shape."""


class Optimizer:
    """AdamW for all parameters, or Muon for the hidden matrices and AdamW for the rest.

    Hidden matrices are the weights of linear layers other than the head; the rest are embeddings, the head, norms,
    biases and vectors. Weight decay is on matrices only.

    Raises:
        UserError: `muon_heads` of a network whose attention is another, or a rate that float32 does not hold.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.model, self.config = model, config
        hidden = hidden_matrices(model) if config.name == "muon" else []
        taken = {id(parameter) for parameter in hidden}
        others = [parameter for parameter in model.parameters() if id(parameter) not in taken]
        groups = [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        # Fused: one kernel for all parameters, and the one that reads `found_inf`.
        self.members: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        ]
        if hidden:
            product = config.lr * config.muon_lr
            require(product <= _LARGEST_RATE, "optim.lr x optim.muon_lr", product, f"{_LARGEST_RATE:g} at most")
            is_narrow = getattr(model, "compute_dtype", None) == "bfloat16"
            self.members.append(
                Muon(
                    _groups(model, hidden, config),
                    lr=config.lr * config.muon_lr,
                    momentum=config.muon_momentum,
                    weight_decay=config.weight_decay,
                    dtype=torch.bfloat16 if is_narrow else hidden[0].dtype,
                )
            )

    def step(self, lr: float, is_bad: Bool[Tensor, ""]) -> None:
        """Updates the weights with the rate `lr`; leaves them and the state as they are if `is_bad`."""
        for member in self.members:
            # The interface of GradScaler: fused AdamW reads the flag on the device, and where it is 1 leaves weights,
            # moments and its step count as they were. Neither another process nor the host has to know.
            member.found_inf = is_bad.float()  # type: ignore[attr-defined]
            for group in member.param_groups:
                group["lr"] = lr * (self.config.muon_lr if isinstance(member, Muon) else 1.0)
            member.step()

    def zero_grad(self) -> None:
        for member in self.members:
            member.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Returns `{parameter name: {"exp_avg": .., "exp_avg_sq": .., "step": ..}}`; of Muon a `momentum_buffer`."""
        # By name, not number: numbers change with the order of the groups. Rates and betas are the configuration's.
        found: dict[str, Any] = {}
        for member in self.members:
            names = self._names(member)
            found |= {names[number]: dict(values) for number, values in member.state_dict()["state"].items()}
        return found

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Returns, by parameter name, tensors of the shapes and formats that `state_dict` has once there are some."""
        adam = {"step": torch.zeros((), dtype=torch.float32)}
        return {
            name: {"momentum_buffer": p} if isinstance(member, Muon) else adam | {"exp_avg": p, "exp_avg_sq": p}
            for member in self.members
            for name, p in zip(self._names(member), _parameters(member), strict=True)
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        for member in self.members:
            numbered = {number: state[name] for number, name in enumerate(self._names(member)) if name in state}
            member.load_state_dict({"state": numbered, "param_groups": member.state_dict()["param_groups"]})

    def _names(self, member: torch.optim.Optimizer) -> list[str]:
        """Returns parameter names in the order in which `member` numbers them."""
        name_of = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [name_of[id(parameter)] for parameter in _parameters(member)]


def _groups(model: nn.Module, matrices: list[Tensor], config: OptimConfig) -> list[dict[str, Any]]:
    """Puts matrices that are cut alike into a group."""
    blocks = _heads(model) if config.muon_heads else {}
    if config.muon_heads and not blocks:
        raise UserError("optim.muon_heads=true: the network has no attention of this package; set it to false")
    groups: dict[tuple[int, int], list[Tensor]] = {}
    for matrix in matrices:
        groups.setdefault(blocks.get(id(matrix), (1, 1)), []).append(matrix)
    return [{"params": alike, "blocks": cut} for cut, alike in groups.items()]


def _heads(model: nn.Module) -> dict[int, tuple[int, int]]:
    """Returns, by the id of a matrix of attention, how many heads stand below and beside each other in it."""
    found: dict[int, tuple[int, int]] = {}
    for attention in model.modules():
        if isinstance(attention, Attention):
            heads, shared = attention.num_heads, attention.num_kv_heads
            cuts = {"q": (heads, 1), "k": (shared, 1), "v": (shared, 1), "out": (1, heads)}
            parts = {name: getattr(attention, name) for name in cuts}
            found |= {id(part.weight): cuts[name] for name, part in parts.items() if isinstance(part, nn.Linear)}
    return found


def _parameters(member: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in member.param_groups for parameter in group["params"]]


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """Returns the weights of all linear layers but the head, whose rows stand for tokens as an embedding's do."""
    head = getattr(getattr(model, "backbone", None), "head_weight", None)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [module.weight for module in linear if module.weight is not head]


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Returns the rate of `step` (from 0) out of `num_steps`: linear warm-up, then by the schedule.

    `cosine` falls to 0 over all that is left, `wsd` (warm-up, stable, decay) in a line over the last `decay_share` of
    the steps, `constant` never. Where the warm-up reaches into the line of `wsd`, the rate is the lower of the two.
    """
    is_warm = step >= config.warmup_steps
    rate = config.lr if is_warm else config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "wsd":
        left = max(0, num_steps - step) / max(1, _decay_steps(num_steps, config))
        return min(rate, config.lr * left) if left < 1 else rate
    if config.schedule == "constant" or not is_warm:
        return rate
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def about_warmup(num_steps: int, config: OptimConfig) -> str | None:
    """Says what comes of a warm-up that is longer than the run, or reaches into its fall; None if it does neither."""
    warmup, fall = config.warmup_steps, _decay_steps(num_steps, config) if config.schedule == "wsd" else 0
    if warmup <= num_steps - fall:
        return None
    meet = (warmup * num_steps - fall) // (warmup + fall)  # the step where the line up meets the line down
    near = range(max(0, meet - 1), min(num_steps, meet + 2))
    reached = max(learning_rate(step, num_steps, config) for step in near)
    if math.isclose(reached, config.lr):
        return None
    where, fix = f"is more than the run's steps ({num_steps})", "a shorter warm-up, or more steps"
    if fall:
        where = (
            f"reaches into the last {fall} of {num_steps} steps, in which the rate falls "
            f"(optim.decay_share={config.decay_share:g})"
        )
        fix = "a shorter warm-up, a smaller optim.decay_share, or more steps"
    return (
        f"optim.warmup_steps={warmup} {where}: the learning rate only comes to {reached:.3g} of "
        f"optim.lr={config.lr:g}; give {fix}"
    )


def about_early_end(step: int, num_steps: int, config: OptimConfig) -> str | None:
    """Says where the learning rate is if a run ends after `step` of the schedule's steps; None if it has taken all."""
    if config.schedule == "constant" or step >= num_steps:
        return None
    reached = learning_rate(step - 1, num_steps, config) / config.lr
    return (
        f"optim.schedule={config.schedule} is for {num_steps} steps, and the run ends after {step}, at {reached:.1%} "
        f"of optim.lr={config.lr:g}; for a rate that falls to 0 by then, give train.steps={step}"
    )


def about_other_length(step: int, before: int, now: int, config: OptimConfig) -> str | None:
    """Says what comes of going on after `step` steps with `now` instead of `before` in all.

    None if this is the run that has had `now` from the start: if both schedules agree up to here.
    """
    shared = config.warmup_steps
    if config.schedule == "wsd":
        # They agree until the shorter one falls, and after that for as long as the warm-up is the lower line.
        later = range(min(total - _decay_steps(total, config) for total in (before, now)), step)
        different = partial(_differ, before=before, now=now, config=config)
        shared = later.start + bisect_left(later, True, key=different)
    if before == now or config.schedule == "constant" or step <= shared:
        return None
    exact = f"go on from a checkpoint of step {shared} or before (move newer ones away)"
    if config.schedule == "cosine":
        exact = "start anew; under optim.schedule=wsd or constant a run can be extended exactly"
    return (
        f"optim.schedule={config.schedule} was of {before} steps, is of {now} steps: from step {step} on the learning "
        f"rate is that of the new length, but until here it was another one. For exactly a run of {now} steps, {exact}"
    )


def _differ(step: int, *, before: int, now: int, config: OptimConfig) -> bool:
    return learning_rate(step, before, config) != learning_rate(step, now, config)


def _decay_steps(num_steps: int, config: OptimConfig) -> int:
    return round(config.decay_share * num_steps)
