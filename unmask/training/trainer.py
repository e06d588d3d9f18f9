"""The training step, the same for every method, and all the state that it changes.

Dimensions: B rows of the global batch, M scored positions.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from unmask import noise
from unmask.config import RunConfig
from unmask.data.stream import EpochStream
from unmask.errors import UserError
from unmask.masking.process import MaskingProcess, ProcessContext, RowShard, score_masked
from unmask.models.attention import train_with
from unmask.models.build import build_denoiser
from unmask.models.compiling import should_compile
from unmask.models.ema import Ema
from unmask.models.measuring import fastest_here
from unmask.models.precision import autocast, parameter_dtype, resolve_dtype
from unmask.noise import Purpose
from unmask.registry import resolve
from unmask.section import name_of
from unmask.training.optim import (
    build_optimizer,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from unmask.types import MaskedBatch, TokenSpec, TokenStats


@dataclass(frozen=True)
class StepReport:
    """What a step has to say; the tensors are on the device, to be read only when they are logged."""

    loss: Tensor
    grad_norm: Tensor
    """Before clipping."""
    is_bad: Tensor
    """Whether one of the two is not finite on any process: the step has left weights and moments as they were."""
    lr: float
    batch: MaskedBatch
    stats: TokenStats

    def metrics(self) -> dict[str, float]:
        """Named values. Waits for the device."""
        is_real = self.batch.weight > 0
        return {
            "train/loss": self.loss.item(),
            "train/grad_norm": self.grad_norm.item(),
            "train/lr": self.lr,
            "train/scored_per_row": is_real.sum().item() / len(self.batch.x0),
            "train/top1": self.stats.top1[is_real].mean().item(),
        }


def resolve_device(name: str) -> torch.device:
    """`auto` is cuda where there is one, else cpu.

    Raises:
        UserError: `name` is no device, or not one of this machine.
    """
    cudas = torch.cuda.device_count()
    valid = ["cpu", *(["cuda", *(f"cuda:{number}" for number in range(cudas))] if cudas else [])]
    if name not in ("auto", *valid):
        raise UserError(f"device {name}: not on this machine; use auto, {', '.join(valid)}")
    return torch.device(("cuda" if cudas else "cpu") if name == "auto" else name)


def num_steps(config: RunConfig, stream: EpochStream) -> int:
    """`train.steps`, or what `train.epochs` comes to when every step takes new examples."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None, "RunConfig has one of them"
    return math.ceil(config.train.epochs * stream.epoch_size / config.train.batch_size)


class Trainer:
    """Model, optimizer, average and masking process, and the step that moves them, whichever the method."""

    def __init__(self, config: RunConfig, tokens: TokenSpec, stream: EpochStream) -> None:
        train = config.train
        self.config = config
        self.tokens = tokens
        self.stream = stream
        self.device = resolve_device(train.device)
        self.dtype = resolve_dtype(train.dtype, self.device)
        self.num_steps = num_steps(config, stream)
        self.shard = RowShard.whole(train.batch_size)
        self.process: MaskingProcess = resolve("process", name_of(config.process)).from_config(
            config.process,
            ProcessContext(tokens=tokens, shard=self.shard, seed=train.seed, device=self.device),
        )
        self.model = build_denoiser(
            config.model,
            tokens,
            requirements=self.process.requirements,
            seed=train.seed,
            dtype=self.dtype,
            device=self.device,
        )
        self.attention: str | None = None
        self.is_compiled = should_compile(train.compile, self.device)
        if self.is_compiled:
            self.model.compile_training()
        self.optimizer = build_optimizer(self.model, config.optim)
        self.ema = Ema(self.model, config.ema.decay) if config.ema.decay else None
        self.step_number = 0
        self.model.train()
        self.has_dropout = any(isinstance(module, nn.Dropout) and module.p for module in self.model.modules())
        if self.has_dropout:
            torch.manual_seed(noise.integer(train.seed, Purpose.DROPOUT))  # nothing else draws from global state

    def choose_attention(self, known: str | None = None) -> None:
        """Measures which attention trains fastest on this CPU, unless it is `known`: runs go on with what they had."""
        if known is None and self.is_compiled and self.device.type == "cpu":
            rows = self.shard.size // self.config.train.accumulate
            dtype = torch.bfloat16 if self.dtype == "bfloat16" else parameter_dtype(self.dtype)
            known = fastest_here(self.model, rows=rows, length=self.tokens.length, dtype=dtype)
        self.attention = known
        train_with(self.model, known)

    def warm_up(self) -> None:
        """Compiles what a step runs, where it is to be compiled, and leaves no trace in the state."""
        shape = (self.shard.size // self.config.train.accumulate, self.tokens.length)
        x0 = torch.full(shape, 1 - min(1, self.tokens.mask_id), device=self.device)  # any token but the mask
        xt = torch.full_like(x0, self.tokens.mask_id)
        xt[:, 0] = x0[:, 0]  # alignment=next needs one to start from
        on_cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(on_cuda):
            self._backward(score_masked(x0, xt, self.tokens.mask_id, torch.zeros(shape[0], device=self.device)))
        self.optimizer.zero_grad()

    def step(self) -> StepReport:
        """One optimizer step."""
        batch = replace(self.process.next_batch(self.stream), step=self.step_number)
        loss, stats = self._forward_backward(batch)
        grad_norm = self._clip()
        is_bad = self._on_any_process(~(loss + grad_norm).isfinite())
        lr = self._update(is_bad)
        self.process.observe(batch, stats)
        self.step_number += 1
        return StepReport(loss=loss, grad_norm=grad_norm, is_bad=is_bad, lr=lr, batch=batch, stats=stats)

    def _forward_backward(self, batch: MaskedBatch) -> tuple[Tensor, TokenStats]:
        """Gradients of the weighted sum of NLLs over the global number of rows, in micro-batches."""
        losses, parts = [], []
        for micro in batch.split(self.config.train.accumulate):
            loss, stats = self._backward(micro)
            losses.append(loss)
            parts.append(stats)
        return torch.stack(losses).sum(), TokenStats.concatenate(parts)

    def _backward(self, micro: MaskedBatch) -> tuple[Tensor, TokenStats]:
        with autocast(self.dtype, self.device):
            stats = self.model(micro)
        loss = (stats.nll * micro.weight.to(stats.nll.dtype)).sum() / self.shard.total
        loss.backward()
        return loss.detach(), stats

    def _clip(self) -> Tensor:
        """Returns the gradient norm before clipping."""
        limit = self.config.optim.grad_clip
        return nn.utils.clip_grad_norm_(self.model.parameters(), math.inf if limit is None else limit)

    def _on_any_process(self, flag: Bool[Tensor, ""]) -> Bool[Tensor, ""]:
        """Whether `flag` is set on any process that shares this step."""
        return flag

    def _update(self, is_bad: Bool[Tensor, ""]) -> float:
        """Step, unless `is_bad`, and average; returns the learning rate."""
        lr = learning_rate(self.step_number, self.num_steps, self.config.optim)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]  # read on the device by fused kernels
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update()
        return lr

    def weights(self, name: str) -> AbstractContextManager[None]:
        """The context in which the model has the weights `ema` or `raw`."""
        return self.ema.applied() if name == "ema" and self.ema is not None else nullcontext()

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Starts from `weights`, the average too."""
        self.model.load_state_dict(weights)
        if self.ema is not None:
            self.ema = Ema(self.model, self.ema.decay)

    def state_dict(self) -> dict[str, Any]:
        """All that survives a step: what is not in here must be a function of the configuration."""
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer_state(self.optimizer, self.model),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "process": self.process.state_dict(),
            "trainer": {
                "step_number": self.step_number,
                "dropout_rng": self._dropout_rng() if self.has_dropout else None,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        load_optimizer_state(self.optimizer, self.model, state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.process.load_state_dict(state["process"])
        self.step_number = state["trainer"]["step_number"]
        if self.has_dropout:
            self._set_dropout_rng(state["trainer"]["dropout_rng"])

    def _dropout_rng(self) -> Tensor:
        is_cuda = self.device.type == "cuda"
        return torch.cuda.get_rng_state(self.device) if is_cuda else torch.get_rng_state()

    def _set_dropout_rng(self, state: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)
