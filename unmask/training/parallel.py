"""A model on several processes: with all weights on each (DDP), or a share of them (FSDP2).

The average of the processes' gradients reaches the optimizer either way, so a loss that is a sum over this process's
rows is multiplied by the number of processes and divided by the global count: never a mean of means.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from unmask.config.run import TrainConfig
from unmask.errors import UserError
from unmask.models.denoiser import Denoiser
from unmask.peers import Peers
from unmask.training.shares import LazyTensor, TensorShard

_ASKED_OF_A_MODEL = ("hidden", "hidden_within", "answer", "logits")
"""What touches weights outside `forward`, and calls none of the others: the end of an inner one would cut the weights
of the outer one into shares again."""


def check_parallel(train: TrainConfig, peers: Peers) -> None:
    """
    Raises:
        UserError: shards are asked of one process, or an offload of no shards.
    """
    if train.parallel == "fsdp" and peers.size == 1:
        raise UserError(
            "train.parallel=fsdp gives every process a share of the model, but there is one process; start several "
            "(torchrun --nproc-per-node 2 -m unmask train ..), or set train.parallel=ddp"
        )
    if train.cpu_offload and train.parallel != "fsdp":
        raise UserError("train.cpu_offload=True is for train.parallel=fsdp; set that, or train.cpu_offload=false")


def wrap(model: Denoiser, train: TrainConfig, peers: Peers, *, dtype: str, device: torch.device) -> nn.Module:
    """What the training step calls in place of `model`, which has the same parameters; itself, with one process."""
    if peers.size == 1:
        return model
    if train.parallel == "ddp":
        ids = [device.index] if device.type == "cuda" else None
        with warnings.catch_warnings():  # newer versions of torch call broadcast_buffers by another name
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    return shard(model, peers.size, dtype=dtype, device=device, cpu_offload=train.cpu_offload)


def shard(model: Denoiser, size: int, *, dtype: str, device: torch.device, cpu_offload: bool = False) -> nn.Module:
    """FSDP2, block by block. Weights of a block travel in bfloat16 where its products are taken in that.

    The residual stream, embeddings and the head's weights stay in fp32, as under autocast in one process.
    """
    mesh = init_device_mesh(device.type, (size,))
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
    narrow = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if dtype == "bfloat16" else None,
        reduce_dtype=torch.float32 if dtype == "bfloat16" else None,
        cast_forward_inputs=False,
    )
    for block in getattr(model.backbone, "blocks", ()):
        fully_shard(block, mesh=mesh, mp_policy=narrow, offload_policy=offload)
        if hasattr(block, "extend"):
            register_fsdp_forward_method(block, "extend")
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(), offload_policy=offload)
    for name in _ASKED_OF_A_MODEL:
        register_fsdp_forward_method(model, name)
    return model


def synchronised(wrapped: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """Processes exchange gradients after the last micro-batch alone."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(is_last)
    if isinstance(wrapped, DistributedDataParallel) and not is_last:
        return wrapped.no_sync()
    return nullcontext()


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """All weights on every process, so that each can ask the model what and as often as it likes."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)


def full(value: Tensor) -> Tensor:
    """All of a tensor of which every process has a share; all processes ask together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shares(tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` with this process's share in place of every tensor that processes share."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found[key] = shares(value)
        elif isinstance(value, DTensor):
            found[key] = TensorShard(value.to_local(), _start(value)) if value.ndim else value.to_local()
        else:
            found[key] = value
    return found


def local_shard(value: Any, like: Tensor) -> Any:
    """Of whole tensors of the shape of `like`, in memory or in files, in a dict perhaps, this process's share."""
    if isinstance(value, dict):
        return {key: local_shard(inner, like) for key, inner in value.items()}
    if not isinstance(like, DTensor) or tuple(value.shape) != tuple(like.shape):
        return value.whole() if isinstance(value, LazyTensor) else value
    own, start = like.to_local(), _start(like)
    share = value[start : start + len(own)].to(own.device)
    return DTensor.from_local(
        share, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _start(value: DTensor) -> int:
    """The first row that is here: FSDP2 cuts the first dimension as `chunk` does."""
    mesh, length = value.device_mesh, value.shape[0]
    return min(length, mesh.get_local_rank() * -(-length // mesh.size()))
