"""The training step, the same for every method, and all the state that it changes.

Dimensions: B rows of the global batch, M scored positions.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from unmask import noise
from unmask.config.run import RunConfig
from unmask.config.settings import LARGEST_INT
from unmask.data.stream import EpochStream
from unmask.errors import UserError
from unmask.masking.process import ProcessContext, build_process, masked_batch
from unmask.models.attention import set_training_backend
from unmask.models.build import build_denoiser
from unmask.models.cost import require_memory_for_model, require_memory_for_rows
from unmask.models.ema import Ema
from unmask.models.lora import load_base
from unmask.models.measuring import measure_fastest
from unmask.models.precision import parameter_dtype, resolve_device, resolve_dtype, should_compile
from unmask.models.transformer_config import TransformerConfig
from unmask.noise import Purpose
from unmask.peers import ALONE, Peers
from unmask.training import parallel, state
from unmask.training.distributed import device_of, generator_of, shard_of
from unmask.training.initial import Base
from unmask.training.optim import Optimizer, learning_rate
from unmask.types import MaskedBatch, TokenSpec, TokenStats


@dataclass(frozen=True)
class StepReport:
    """The results of a step. Its tensors stay on the device until they are logged."""

    loss: Tensor
    """Loss of the global batch. Norm and `is_bad` are global too; batch and statistics are this process's."""
    grad_norm: Tensor
    """Norm of the gradient before clipping."""
    is_bad: Tensor
    """True if one of the two is not finite; the step has then left weights and moments as they were."""
    lr: float
    passes: float
    """Forward passes over the rows of the batch (`Denoiser.count_passes`)."""
    batch: MaskedBatch
    stats: TokenStats

    def metrics(self, peers: Peers = ALONE) -> dict[str, float]:
        """Returns the values to log, by name. Waits for the device. Collective."""
        is_real = self.batch.weight > 0
        own = torch.stack([noise.wide(is_real.sum()), noise.wide(self.stats.top1[is_real]).sum()])
        scored, top1 = peers.sum(own).tolist()
        return {
            "train/loss": self.loss.item(),
            "train/grad_norm": self.grad_norm.item(),
            "train/lr": self.lr,
            "train/scored_per_row": scored / (len(self.batch.x0) * peers.size),
            "train/top1": top1 / max(1, scored),
        }


_MOST_STEPS = 10**10
"""Steps of a run that nothing else ends: four months at a thousand a second."""


def num_steps(config: RunConfig, stream: EpochStream) -> int:
    """Returns `train.steps`, or else epochs x examples / batch size, rounded up.

    Raises:
        UserError: a part of an epoch is less than a step, or there are more steps than a run can reach.
    """
    train = config.train
    ends_sooner = train.max_seconds is not None or train.max_examples is not None
    if train.steps is not None:
        if train.steps > _MOST_STEPS and not ends_sooner:
            raise UserError(
                f"train.steps={train.steps}: at a thousand a second these take {train.steps / 3.15e10:,.0f} years; "
                "give fewer, or say with train.max_seconds or train.max_examples when the run ends"
            )
        return train.steps
    assert train.epochs is not None, "RunConfig has one of them"
    steps = train.epochs * stream.epoch_size / train.batch_size
    if steps > (LARGEST_INT if ends_sooner else _MOST_STEPS) or (steps < 1 and train.epochs < 1):
        raise UserError(
            f"train.epochs={train.epochs:g} of {stream.epoch_size:,} examples are {steps:.3g} steps of "
            f"train.batch_size={train.batch_size}; give train.steps, or other epochs"
        )
    return math.ceil(steps)


def require_memory_for_training(config: RunConfig, tokens: TokenSpec, peers: Peers, device: torch.device) -> None:
    """Checks that weights, optimizer and batch can fit, before anything is made.

    Raises:
        UserError: they need more memory than there is.
    """
    train = config.train
    is_sharded = train.parallel == "fsdp" and peers.size > 1
    place = None if train.cpu_offload else device
    copies = config.optim.copies + bool(config.ema.decay)
    shards = peers.size if is_sharded else 1
    require_memory_for_model(config.model, tokens, device=place, copies=copies, shards=shards)
    rows = train.batch_size // peers.size
    require_memory_for_rows(
        config.model,
        tokens,
        rows=rows,
        at_once=rows // train.accumulate,
        trained=True,
        what=f"train.batch_size={train.batch_size} with train.accumulate={train.accumulate}",
        device=device,
    )


class Trainer:
    """Model, optimizer, average and masking process, and the step that moves them, the same for every method."""

    PER_PARAMETER = ("model", "optimizer", "ema")
    """Sections of the state that hold tensors for each parameter, which FSDP2 shards."""

    def __init__(self, config: RunConfig, tokens: TokenSpec, stream: EpochStream, peers: Peers = ALONE) -> None:
        train = config.train
        self.config = config
        self.tokens = tokens
        self.stream = stream
        self.peers = peers
        with peers.raise_together():
            self._build()
        self.attention: str | None = None
        self.is_compiled = all(peers.exchange(should_compile(train.compile, self.device)))
        self.is_sharded = train.parallel == "fsdp" and peers.size > 1
        if self.is_compiled:
            self.model.compile_training(by_block=self.is_sharded)
        self.trained = parallel.wrap(self.model, train, peers, device=self.device)
        with peers.raise_together():
            self.optimizer = Optimizer(self.model, config.optim)
        self.ema = Ema(self.model, config.ema.decay) if config.ema.decay else None
        self.step_number = 0
        self.trained.train()
        self.has_dropout = any(isinstance(module, nn.Dropout) and module.p for module in self.model.modules())
        if self.has_dropout:
            self._set_dropout_rng(None)  # dropout alone draws from global state: all other noise is keyed

    def _build(self) -> None:
        """Builds this process's own parts, without communication: device, rows, masking process and model."""
        train = self.config.train
        self.device = resolve_device(device_of(self.peers, train.device))
        require_memory_for_training(self.config, self.tokens, self.peers, self.device)
        self.num_steps = num_steps(self.config, self.stream)
        self.shard = shard_of(self.peers, train.batch_size, train.accumulate)
        context = ProcessContext(tokens=self.tokens, shard=self.shard, seed=train.seed, device=self.device)
        self.process = build_process(self.config.process, context)
        self.model = build_denoiser(
            self.config.model,
            self.tokens,
            requirements=self.process.requirements,
            seed=train.seed,
            dtype=resolve_dtype(train.dtype, self.device),
            device=self.device,
        )

    def choose_attention(self, known: str | None = None) -> None:
        """Chooses the attention that trains fastest on this CPU, by measurement unless it is `known`. Collective."""
        # A resumed run keeps its choice, and rank 0 measures for all: other choices would give other bits.
        if known is None and self.is_compiled and self.device.type == "cpu" and self.peers.is_main:
            rows = self.shard.size // self.config.train.accumulate
            name = self.model.compute_dtype
            dtype = torch.bfloat16 if name == "bfloat16" else parameter_dtype(name)
            known = measure_fastest(self.model, rows=rows, length=self.tokens.length, dtype=dtype)
        self.attention = known = self.peers.exchange(known)[0]
        set_training_backend(self.model, known)

    def warm_up(self) -> None:
        """Runs one forward and backward pass, so that the model is compiled; leaves the state as it was."""
        shape = (self.shard.size // self.config.train.accumulate, self.tokens.length)
        x0 = torch.full(shape, 1 - min(1, self.tokens.mask_id), device=self.device)  # any token but the mask
        xt = torch.full_like(x0, self.tokens.mask_id)
        xt[:, 0] = x0[:, 0]  # alignment=next needs one to start from
        on_cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(on_cuda):
            self._backward(masked_batch(x0, xt, self.tokens.mask_id, torch.zeros(shape[0], device=self.device)))
        self.optimizer.zero_grad()

    def step(self) -> StepReport:
        """Takes one optimizer step."""
        batch = replace(self.process.next_batch(self.stream), step=self.step_number)
        loss, stats = self._forward_backward(batch)
        # Statistics are those of the weights before the update. The process reveals by them before it too, so that the
        # device is busy with the update while the CPU learns what the next batch needs.
        self.process.observe(batch, stats)
        grad_norm = self._clip()
        # Loss and norm are sums over all processes, so all of them agree. The flag stays on the device: reading it
        # here would wait for the whole step.
        is_bad = ~(loss + grad_norm).isfinite()
        lr = self._update(is_bad)
        self.step_number += 1
        passes = self.model.count_passes(batch)
        return StepReport(loss=loss, grad_norm=grad_norm, is_bad=is_bad, lr=lr, passes=passes, batch=batch, stats=stats)

    def _forward_backward(self, batch: MaskedBatch) -> tuple[Tensor, TokenStats]:
        """Accumulates gradients of (weighted sum of NLLs) / (rows of the global batch), in micro-batches."""
        losses, parts = [], []
        micros = batch.split(self.config.train.accumulate)
        for number, micro in enumerate(micros, start=1):
            # Gradients of the earlier micro-batches stay local: one exchange per step, not one per micro-batch.
            with parallel.sync_gradients(self.trained, number == len(micros)):
                loss, stats = self._backward(micro)
            losses.append(loss)
            parts.append(stats)
        loss = self.peers.sum(torch.stack(losses).sum()) / self.peers.size
        return loss, TokenStats.concatenate(parts)

    def _backward(self, micro: MaskedBatch) -> tuple[Tensor, TokenStats]:
        """Adds the gradients of one micro-batch; returns its loss and statistics."""
        stats = self.trained(micro)
        # DDP and FSDP2 average gradients over processes. Times their number, the average is the sum over all rows
        # divided by the global number of rows, whatever number of positions each process scores.
        loss = (stats.nll * micro.weight.to(stats.nll.dtype)).sum() * self.peers.size / self.shard.total
        loss.backward()
        return loss.detach(), stats

    def _clip(self) -> Tensor:
        """Clips the gradient; returns its norm before clipping."""
        limit = self.config.optim.grad_clip
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), math.inf if limit is None else limit)
        return parallel.gather_tensor(norm)

    def _update(self, is_bad: Bool[Tensor, ""]) -> float:
        """Updates the weights, unless `is_bad`, and the average; returns the learning rate."""
        lr = learning_rate(self.step_number, self.num_steps, self.config.optim)
        self.optimizer.step(lr, is_bad)
        self.optimizer.zero_grad()
        # After a bad step the average moves towards unchanged, finite weights.
        if self.ema is not None:
            self.ema.update()
        return lr

    @contextmanager
    def weights(self, name: str) -> Iterator[None]:
        """Gives the model the weights `ema` or `raw` inside the context, all of them on every process."""
        assert name == "raw" or self.ema is not None, f"no weights {name}"
        averaged = nullcontext() if name == "raw" or self.ema is None else self.ema.apply()
        # The average is sharded as the weights are, so it is copied in before they are gathered.
        with averaged, parallel.gather_weights(self.model):
            yield

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Sets the model's weights, and starts the average from them."""
        self.model.load_state_dict(self._local_shards(weights))
        if self.ema is not None:
            self.ema = Ema(self.model, self.ema.decay)

    def load_base(self, base: Base) -> None:
        """Sets the frozen weights under the adapters."""
        assert isinstance(self.config.model, TransformerConfig), "adapters are the transformer's"
        assert self.config.model.lora is not None, "there are adapters"
        load_base(self.model, base.tensors, trains_mask_row=base.trains_mask_row(self.config.model.lora))

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that survives a step; all else must be a function of the configuration. Collective.

        It is the state of all processes, whatever their number. Rank 0's result is complete but for the other ranks'
        shards of the model.
        """
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "process": self.process.state_dict(),
            "trainer": {
                "step_number": self.step_number,
                "dropout_rng": self._dropout_rng() if self.has_dropout else None,
            },
        }
        return parallel.to_shards(state)

    def load_state_dict(
        self, saved: dict[str, Any], where: str = "the checkpoint", *, is_checked: bool = False
    ) -> None:
        """Restores a state, saved by any number of processes; sections `PER_PARAMETER` may be `LazyTensor`s.

        Args:
            saved: what `state_dict` returned.
            where: names it in errors.
            is_checked: `read_own` returned it.

        Raises:
            UserError: the state is of another model, or damaged. Nothing is loaded then.
        """
        if not is_checked:
            saved = self.read_own(saved, where)
        self.step_number = saved["trainer"]["step_number"]
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(saved["ema"])
        self.load_process(saved["process"], where)
        if self.has_dropout:
            self._set_dropout_rng(saved["trainer"]["dropout_rng"])

    def load_process(self, saved: dict[str, Any], where: str) -> None:
        """Restores the masking process.

        Raises:
            UserError: the state is not of this process.
        """
        with _reading_process(where):
            self.process.load_state_dict(saved)

    def check(self, saved: dict[str, Any], where: str) -> None:
        """Checks all of a state, before anything of it is loaded.

        Raises:
            UserError: something is not as this trainer's own state has it, or not finite.
        """
        own, moments = self.model.state_dict(), self.optimizer.moments()
        averaged = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        state.check(saved, where, own=own, moments=moments, averaged=averaged if self.ema is not None else None)
        check_process = getattr(self.process, "check_state", None)
        if check_process is not None:
            with _reading_process(where):
                check_process(saved["process"], self.tokens)
        estimate = saved["process"].get("estimate")
        if isinstance(estimate, Tensor) and not self.model.is_self_conditioned:
            raise UserError(f"{where}, process: estimate: is of a self-conditioned model, which this is not")
        rng = saved["trainer"].get("dropout_rng")
        wide = len(self._dropout_rng()[0]) if self.has_dropout and self.peers.size == 1 else None
        if rng is not None and (rng.dtype != torch.uint8 or rng.ndim != 2 or wide not in (None, rng.shape[1])):
            raise UserError(
                f"{where}, trainer: dropout_rng: is {tuple(rng.shape)} of {rng.dtype}: no generator's state"
            )

    def read_own(self, saved: dict[str, Any], where: str) -> dict[str, Any]:
        """Checks all of a state, and returns it with this process's part of each tensor. Nothing is loaded.

        Raises:
            UserError: as `check`, or what is read of a shard is not finite; names the file.
        """
        self.check(saved, where)
        sections = {name: self._local_shards(saved[name], where) for name in ("model", "optimizer")}
        if saved["ema"] is not None:
            sections["ema"] = saved["ema"] | {"shadow": self._local_shards(saved["ema"]["shadow"], where)}
        return saved | sections

    def _local_shards(self, values: dict[str, Any], where: str = "the weights") -> dict[str, Any]:
        """Returns this process's part of `values`, by parameter name; checks those that are read here."""
        own = self.model.state_dict()
        shards = {name: parallel.local_shard(value, own[name]) for name, value in values.items()}
        if self.is_sharded:
            sources = state.split(values)[0]
            for name, tensor in state.split(shards)[0].items():
                source, parameter = sources[name], own[name.partition(state.SEPARATOR)[0]]
                files = source.files(parallel.local_rows(parameter)) if isinstance(source, parallel.LazyTensor) else []
                *above, last = name.split(state.SEPARATOR)
                place = ", ".join([f"{where}/{' and '.join(files)}" if files else where, *above])
                state.check_values(last, parallel.local_part(tensor), place)
        return shards

    def _dropout_rng(self) -> Tensor:
        """Returns the generator states of all processes, (processes, bytes): each draws for its own rows."""
        own = generator_of(self.device).get_state()
        return self.peers.gather(own.unsqueeze(0))

    def _set_dropout_rng(self, saved: Tensor | None) -> None:
        """Restores the generator state `saved`; seeds it anew if there is none for this number of processes."""
        if saved is None or len(saved) != self.peers.size:
            keys = (self.peers.rank, self.step_number) if self.peers.rank or self.step_number else ()
            torch.manual_seed(noise.integer(self.config.train.seed, Purpose.DROPOUT, *keys))
            return
        own = saved[self.peers.rank].clone()  # torch reads a whole tensor's memory, from an aligned start
        generator_of(self.device).set_state(own)


@contextmanager
def _reading_process(where: str) -> Iterator[None]:
    """Names the checkpoint `where` in errors of its process, which may be anybody's, and of another shape than ours."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}, process: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise UserError(f"{where}, process: {error!r}: is it this run's?") from error
