"""What `test_head.py` runs in each of two processes: gradients from the rows that are its own.

`python -m tests.distributed.head_cases FOLDER RANK` writes them, and the statistics, to FOLDER, a file a wrapper.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from unmask.masking.process import Requirements, masked_batch
from unmask.models import denoiser
from unmask.models.build import build_denoiser
from unmask.models.denoiser import Denoiser
from unmask.models.head import token_stats
from unmask.models.transformer_config import TransformerConfig
from unmask.training.parallel import sync_gradients
from unmask.types import MaskedBatch, TokenSpec

WORLD = 2
ROWS, LENGTH, MASK_ID = 8, 48, 100
STEPS = 2  # after its first backward pass DDP orders its buckets anew, and FSDP2 frees what it gathered
WRAPPERS = ("ddp", "fsdp2", "fsdp2_frees_the_root")
CASES = [(tied, parts) for tied, parts in product((False, True), (1, 2))]


def key(tied: bool, parts: int, step: int, name: str) -> str:
    return f"tied={tied}, {parts} micro-batches, step {step}: {name}"


@contextmanager
def large_head() -> Iterator[None]:
    """101 values count as many, and are taken 30 at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoiser, "LARGE_VOCABULARY", 101)
        patch.setattr(denoiser, "token_stats", partial(token_stats, chunk=30))
        yield


def model(tied: bool) -> Denoiser:
    return build_denoiser(
        TransformerConfig(preset="tiny", tied_head=tied),
        TokenSpec(vocab_size=101, length=LENGTH, mask_id=MASK_ID),
        requirements=Requirements(confidence="margin"),
        dtype="float64",
    )


def batch(start: int, stop: int) -> MaskedBatch:
    """These rows of one batch. The later, the more is masked: the halves differ in their padded number of positions."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(MASK_ID, (ROWS, LENGTH), generator=generator)
    is_masked = torch.rand(ROWS, LENGTH, generator=generator) < torch.linspace(0.1, 0.9, ROWS).unsqueeze(1)
    weight = is_masked.sum(dim=1, dtype=torch.float64).reciprocal()
    xt = torch.where(is_masked, MASK_ID, x0)
    return masked_batch(x0[start:stop], xt[start:stop], MASK_ID, weight[start:stop])


def backward(model: nn.Module, batch: MaskedBatch, world_size: int = 1) -> dict[str, Tensor]:
    """The gradients of one batch, added to those that are there; returns the statistics, each (B, L)."""
    stats = model(batch)
    loss = (stats.nll * batch.weight).sum() * world_size / ROWS
    loss.backward()
    return {name: batch.scatter(getattr(stats, name).detach(), 0.0) for name in ("nll", "confidence", "top1")}


def wrap(model: Denoiser, wrapper: str) -> nn.Module:
    """By default FSDP2 keeps the root's parameters, the head's among them, from the forward to the backward pass."""
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.backbone.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True if wrapper == "fsdp2_frees_the_root" else None)


def results(wrapper: str, rank: int, tied: bool, parts: int) -> dict[str, Tensor]:
    mine = ROWS // WORLD
    bare, found = model(tied), {}
    wrapped = wrap(bare, wrapper)
    for step in range(STEPS):
        wrapped.zero_grad()
        stats = []
        for i, micro in enumerate(batch(rank * mine, (rank + 1) * mine).split(parts), start=1):
            with sync_gradients(wrapped, i == parts):
                stats.append(backward(wrapped, micro, WORLD))
        gradients = {name: parameter.grad for name, parameter in bare.named_parameters()}
        whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
        joined = {name: torch.cat([part[name] for part in stats]) for name in stats[0]}
        found |= {key(tied, parts, step, name): value.clone() for name, value in (whole | joined).items()}
    return found


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    for wrapper in WRAPPERS:
        found: dict[str, Tensor] = {}
        with large_head():
            for case in CASES:
                found |= results(wrapper, rank, *case)
        save_file(found, folder / f"{wrapper}_{rank}.safetensors")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
