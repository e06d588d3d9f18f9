"""A model on several processes: with all weights on each (DDP), or a shard of them (FSDP2).

Both average gradients over the processes, so the loss (a sum over this process's rows) is multiplied by the number of
processes and divided by the global count: never a mean of means.

Checkpoints of sharded models are files of tensor shards: each process writes its own, and a reader reads only the rows
that it needs. The layout is that of `torch.distributed.checkpoint`'s `HuggingFaceStorageWriter`, and PyTorch's reader
can read it: safetensors files, whose head holds the offset of each tensor in the whole. It needs no pickle, and no
exchange between processes, so a thread can write it while they train.
"""

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
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

from unmask import files, formats
from unmask.config.run import TrainConfig
from unmask.errors import UserError
from unmask.models.denoiser import Denoiser
from unmask.models.on_demand import OnDemand, outline
from unmask.peers import Peers
from unmask.tensor_files import DTYPES

_OFFSETS = "DCP_SHARDING_INFO"
_OFFSET = "saved_offsets"


@dataclass(frozen=True)
class TensorShard:
    """The rows of a tensor, from `start` on, that one process holds."""

    own: Tensor
    start: int


class LazyTensor:
    """A tensor in one or several files, each with some of its rows, read when it is indexed."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[Any, str]] = {}
        """Open file and name in it, by the first row there."""
        self._files: dict[int, str] = {}
        """Names of the files, in the same way."""

    def add(self, start: int, file: Any, name: str, file_name: str) -> None:
        """Adds the rows from `start` on.

        Raises:
            ValueError: they are there already.
        """
        if start in self._parts:
            raise ValueError(f"{file_name}: rows of {name} from {start} on are in {self._files[start]} too")
        self._parts[start] = file, name
        self._files[start] = file_name

    def files(self, rows: slice = slice(None)) -> list[str]:
        """Names the files that hold these rows."""
        first, last, _ = rows.indices((self.shape or (1,))[0])
        held = ((start, start + (self._shape(*part) or (1,))[0]) for start, part in sorted(self._parts.items()))
        return [self._files[start] for start, stop in held if start < last and stop > first]

    @property
    def dtype(self) -> torch.dtype:
        file, name = self._parts[min(self._parts)]
        return DTYPES[file.get_slice(name).get_dtype()]

    def check(self) -> None:
        """Checks that the parts are one tensor, in the order of their files, without reading them.

        Raises:
            ValueError: rows are missing or there twice, of several shapes or formats, or of one that is never saved;
                names the file.
        """
        stop, before, kind = 0, "", None
        for start, (file, name) in sorted(self._parts.items()):
            part, here = file.get_slice(name), self._files[start]
            rows, *rest = part.get_shape() or [1]
            if start > stop and (lacking := files_beside(here) - {*self._files.values()}):
                raise ValueError(f"{min(lacking)}: lacks rows {stop} to {start} of {name}")
            if start != stop or here < before:
                others = f"those in {before}" if before else "others"
                raise ValueError(
                    f"{here}: rows {start} to {start + rows} of {name} do not follow {others}, which end at {stop}"
                )
            if part.get_dtype() not in DTYPES:
                raise ValueError(f"{here}: {name[:200]} is in {part.get_dtype()}, which no run saves")
            if kind not in (None, (own := [part.get_dtype(), *rest])):
                raise ValueError(f"{here}: rows of {name} are {own}, in {before} {kind}")
            stop, before, kind = start + rows, here, [part.get_dtype(), *rest]

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = [(start, self._shape(*part)) for start, part in self._parts.items()]
        first = shapes[0][1]
        return (max(start + shape[0] for start, shape in shapes), *first[1:]) if first else first

    @staticmethod
    def _shape(file: Any, name: str) -> tuple[int, ...]:
        return tuple(file.get_slice(name).get_shape())

    def __getitem__(self, rows: slice) -> Tensor:
        """Reads these rows.

        Raises:
            ValueError: not all of them are in the files.
        """
        first, last, _ = rows.indices(self.shape[0])
        found = []
        for start, (file, name) in sorted(self._parts.items()):
            stop = start + self._shape(file, name)[0]
            if start < last and stop > first:
                found.append(file.get_slice(name)[max(first, start) - start : min(last, stop) - start])
        if not found and first >= last:
            file, name = self._parts[min(self._parts)]
            return file.get_slice(name)[0:0]
        if sum(map(len, found)) != last - first:
            raise ValueError(f"{name}: rows {first} to {last} are not all there")
        return found[0] if len(found) == 1 else torch.cat(found)

    def whole(self) -> Tensor:
        if len(self._parts) == 1:
            ((file, name),) = self._parts.values()
            return file.get_tensor(name)
        return self[:]


def on_demand(stored: Mapping[str, LazyTensor]) -> OnDemand:
    """Returns whole tensors that were checked, each read when it is asked for."""
    outlines = {name: outline(torch.Size(each.shape), each.dtype) for name, each in stored.items()}
    return OnDemand(outlines, lambda name: stored[name].whole())


_FILE = re.compile(r"(.+?)(?:-[0-9]{5}-of-([0-9]{5}))?\.safetensors")


def file_name(section: str, rank: int, size: int) -> str:
    """Returns the name of the file in which process `rank` of `size` saves its shards of a section of the state."""
    return f"{section}-{rank + 1:05d}-of-{size:05d}.safetensors"


def section_of(file: str) -> str | None:
    """Returns the section of which the file of this name holds tensors, whole or in shards."""
    found = _FILE.fullmatch(file)
    return None if found is None else found[1]


def files_beside(file: str) -> set[str]:
    """Returns the names of all processes' files of the section, if `file` names one of shards; else nothing."""
    found = _FILE.fullmatch(file)
    if found is None or found[2] is None:
        return set()
    return {file_name(found[1], rank, int(found[2])) for rank in range(int(found[2]))}


def write(path: Path, shares: dict[str, TensorShard]) -> None:
    """Writes the shards of one process, by tensor name; leaves out shards without rows."""
    held = {name: share for name, share in shares.items() if len(share.own)}
    offsets = {name: {_OFFSET: [share.start] + [0] * (share.own.ndim - 1)} for name, share in held.items()}
    metadata = {"format": "pt", "DCP_VERSION": "1.0", _OFFSETS: json.dumps(offsets)}
    files.put_tensors(path, {name: share.own for name, share in held.items()}, metadata)


def read(paths: Iterable[Path]) -> dict[str, LazyTensor]:
    """Returns the tensors in these files, whole or sharded, by name.

    Raises:
        SafetensorError: not such a file.
        ValueError: the offsets in a file are malformed, or rows are there twice.
    """
    found: dict[str, LazyTensor] = {}
    for path in paths:
        file: Any = safe_open(path, framework="pt")
        offsets = formats.parse_json((file.metadata() or {}).get(_OFFSETS, "{}"), f"{path}, {_OFFSETS}")
        for name in file.keys():  # noqa: SIM118 - no mapping
            found.setdefault(name, LazyTensor()).add(_shard_start(offsets, name, path.name), file, name, path.name)
    return found


def _shard_start(offsets: Any, name: str, file: str) -> int:
    try:
        start = (offsets[name][_OFFSET] or [0])[0] if name in offsets else 0
    except (TypeError, KeyError) as error:
        raise ValueError(f"{file}: {_OFFSETS} says nothing of where {name} begins") from error
    if type(start) is not int or not 0 <= start < 2**53:
        raise ValueError(f"{file}: {_OFFSETS} lets {name} begin at {str(start)[:40]}, which is no row")
    return start


_FORWARD_METHODS = ("hidden", "hidden_within", "predict_from_hidden", "logits")
"""Methods other than `forward` that read weights. None calls another: at the end of the inner call FSDP2 would reshard
the weights that the outer one still needs."""


def check_parallel(train: TrainConfig, peers: Peers) -> None:
    """Checks `train.parallel` and `train.cpu_offload`.

    Raises:
        UserError: `fsdp` with one process, or an offload without `fsdp`.
    """
    if train.parallel == "fsdp" and peers.size == 1:
        raise UserError(
            "train.parallel=fsdp gives every process a share of the model, but there is one process; start several "
            "(torchrun --nproc-per-node 2 -m unmask train ..), or set train.parallel=ddp"
        )
    if train.cpu_offload and train.parallel != "fsdp":
        raise UserError("train.cpu_offload=True is for train.parallel=fsdp; set that, or train.cpu_offload=false")


def wrap(model: Denoiser, train: TrainConfig, peers: Peers, *, device: torch.device) -> nn.Module:
    """Returns the module that the training step calls, with the parameters of `model`; one process: `model`."""
    if peers.size == 1:
        return model
    if train.parallel == "ddp":
        ids = [device.index] if device.type == "cuda" else None
        unread = [
            name for name, buffer in model.named_buffers() if buffer.is_meta
        ]  # of a base, which each process reads
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, unread)
        # No broadcast: the only buffers, rotary angles, are constants. Gradients as views of the buckets spare a copy.
        with warnings.catch_warnings():  # newer versions of torch call broadcast_buffers by another name
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    return shard(model, peers.size, device=device, cpu_offload=train.cpu_offload)


def shard(model: Denoiser, size: int, *, device: torch.device, cpu_offload: bool = False) -> nn.Module:
    """Shards `model` with FSDP2, block by block.

    Under bfloat16 the weights of a block are gathered in bfloat16, and gradients are reduced in fp32. The residual
    stream, embeddings and the head's weights stay in fp32, as under autocast in one process.
    """
    mesh = init_device_mesh(device.type, (size,))
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
    is_narrow = model.compute_dtype == "bfloat16"
    narrow = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if is_narrow else None,
        reduce_dtype=torch.float32 if is_narrow else None,
        cast_forward_inputs=False,
    )
    for block in getattr(model.backbone, "blocks", ()):
        fully_shard(block, mesh=mesh, mp_policy=narrow, offload_policy=offload)
        if hasattr(block, "extend"):
            register_fsdp_forward_method(block, "extend")
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(), offload_policy=offload)
    for name in _FORWARD_METHODS:
        register_fsdp_forward_method(model, name)
    return model


def sync_gradients(wrapped: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """Returns a context whose backward pass exchanges gradients only if the micro-batch `is_last`."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(is_last)
    if isinstance(wrapped, DistributedDataParallel) and not is_last:
        return wrapped.no_sync()
    return nullcontext()


@contextmanager
def gather_weights(model: nn.Module) -> Iterator[None]:
    """Keeps all weights on every process inside the context."""
    # Each process may then call the model as often as it likes: no call exchanges anything.
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


def gather_tensor(value: Tensor) -> Tensor:
    """Gathers a sharded tensor; returns any other as it is. Collective."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local_part(value: Tensor) -> Tensor:
    """Returns this process's part of a sharded tensor; any other as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def to_shards(tree: dict[str, Any]) -> dict[str, Any]:
    """Replaces every sharded tensor in `tree` by this process's shard of it."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found[key] = to_shards(value)
        elif isinstance(value, DTensor):
            found[key] = TensorShard(value.to_local(), _start(value)) if value.ndim else value.to_local()
        else:
            found[key] = value
    return found


def local_shard(value: Any, like: Tensor) -> Any:
    """Returns this process's shard of `value`, sharded as `like`.

    `value` is a tensor of the same shape, a `LazyTensor`, or a dict of them. Other values are returned whole.
    """
    if isinstance(value, dict):
        return {key: local_shard(inner, like) for key, inner in value.items()}
    if not isinstance(like, DTensor) or tuple(value.shape) != tuple(like.shape):
        return value.whole() if isinstance(value, LazyTensor) else value
    own, start = like.to_local(), _start(like)
    share = value[start : start + len(own)].to(own.device)
    return DTensor.from_local(
        share, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def local_rows(like: Tensor) -> slice:
    """Returns the rows of a tensor that this process holds of one sharded as `like`; otherwise all."""
    if not isinstance(like, DTensor) or not like.ndim:
        return slice(None)
    return slice(_start(like), _start(like) + len(like.to_local()))


def _start(value: DTensor) -> int:
    """Returns the first row of this process's shard: FSDP2 cuts the first dimension as `torch.chunk` does."""
    mesh, length = value.device_mesh, value.shape[0]
    return min(length, mesh.get_local_rank() * -(-length // mesh.size()))
