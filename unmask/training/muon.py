"""Muon, for matrices: the momentum made orthogonal is the update (Jordan et al. 2024; Liu et al. 2025, 2502.16982).

A matrix may be cut into blocks, such as heads of attention, each made orthogonal on its own (Kimi K3, 2607.24653).
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from unmask.training.parallel import local_part


class Muon(torch.optim.Optimizer):
    """Muon as `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, for all matrices of a shape at once.

    With gradient G, momentum B and rate lr, a step of a matrix W of n x m is:

        B <- mu B + (1 - mu) G
        U = orthogonalize(mu B + (1 - mu) G)
        W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(n, m)) U

    The factor lets an update have the root mean square of AdamW's. A matrix in blocks is as many matrices. Where
    `found_inf` is not 0, weights and momentum stay as they are. It is a tensor, so that no step waits for the device.
    """

    found_inf: Tensor

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        """Takes the settings.

        Args:
            groups: matrices, as `params`, and optionally into how many `blocks` (down, across) each of them is cut.
            lr: the rate.
            momentum: mu.
            weight_decay: as in the formula above.
            dtype: the format in which an update is made orthogonal.
        """
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "blocks": (1, 1)})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[matrix.shape].append(matrix)
                    if not self.state[matrix]:
                        self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
            for matrices in alike.values():
                self._step(matrices, group)

    def _step(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """Updates matrices of one shape."""
        lr, mu = group["lr"], group["momentum"]
        weights = [local_part(matrix) for matrix in matrices]
        momenta = [local_part(self.state[matrix]["momentum_buffer"]) for matrix in matrices]
        gradients = [local_part(matrix.grad) for matrix in matrices if matrix.grad is not None]
        is_bad = (self.found_inf > 0).to(weights[0].device)  # another device only with weights offloaded to the CPU
        updates = weights[0].new_empty((len(weights), *weights[0].shape), dtype=self.dtype)
        # One matrix at a time stays in a CPU's cache; a GPU wants few kernels, so all at a time.
        count = 1 if updates.device.type == "cpu" else len(weights)
        parts = [slice(start, start + count) for start in range(0, len(weights), count)]
        for part in parts:
            old = torch.stack(momenta[part])
            gradient = torch.where(is_bad, old, torch.stack(gradients[part]))  # finite, so that the update is
            new = old.lerp(gradient, 1 - mu)
            updates[part] = gradient.lerp_(new, mu)
            torch._foreach_copy_(momenta[part], torch.where(is_bad, old, new).unbind())
        updates = _orthogonalized(updates, matrices[0], group["blocks"])
        rows, columns = (size // cut for size, cut in zip(matrices[0].shape, group["blocks"], strict=True))
        scale = 0.2 * max(rows, columns) ** 0.5
        for part in parts:
            old = torch.stack(weights[part])
            new = (old * (1 - lr * group["weight_decay"])).add_(updates[part], alpha=-lr * scale)
            torch._foreach_copy_(weights[part], torch.where(is_bad, old, new).unbind())


def _orthogonalized(updates: Float[Tensor, "n r m"], like: Tensor, blocks: tuple[int, int]) -> Float[Tensor, "n r m"]:
    """Makes updates orthogonal; of matrices sharded as `like`, each process has some rows r of every one."""
    if not isinstance(like, DTensor):
        return _orthogonalize_blocks(updates, blocks)
    # Only a whole matrix can be made orthogonal: processes exchange rows of all matrices for some whole ones, and back.
    mesh, shape = like.device_mesh, torch.Size([len(updates), *like.shape])
    stride = (like.numel(), like.shape[1], 1)

    def exchanged(own: Tensor, before: int, after: int) -> Tensor:
        own = own.contiguous().to(mesh.device_type)
        sharded = DTensor.from_local(own, mesh, [Shard(before)], run_check=False, shape=shape, stride=stride)
        if mesh.device_type == "cpu":  # gloo has no all-to-all
            sharded = sharded.redistribute(placements=[Replicate()])
        return sharded.redistribute(placements=[Shard(after)]).to_local()

    whole = exchanged(updates, 1, 0)
    return exchanged(_orthogonalize_blocks(whole, blocks), 0, 1).to(updates.device)


def _orthogonalize_blocks(updates: Float[Tensor, "n r m"], blocks: tuple[int, int]) -> Float[Tensor, "n r m"]:
    """Makes each of the `blocks` (down, across) that a matrix is cut into orthogonal."""
    down, across = blocks
    cut = updates.unflatten(2, (across, -1)).unflatten(1, (down, -1)).transpose(2, 3)
    done = orthogonalize(cut.flatten(0, 2)).view_as(cut)
    return done.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def orthogonalize(updates: Float[Tensor, "n r m"]) -> Float[Tensor, "n r m"]:
    """Sets the singular values of each matrix near 1 (0.7 to 1.2), by five Newton-Schulz steps.

    Each is X <- a X + (b A + c A^2) X with A = X X^T, from X of norm 1; a, b, c are Jordan's, for fast growth from 0.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = updates.shape[1] > updates.shape[2]
    x = updates.mT if is_tall else updates  # A of the shorter side
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
