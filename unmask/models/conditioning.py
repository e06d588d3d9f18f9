"""Self-conditioning: a masked position is also told what a pass before expected of it (Chen et al. 2022, 2208.04202).

With `p` that pass's prediction, E the embedding and W a matrix that starts at 0, its input is
`E[mask] + W sum_v p(v) E[v]`. In every other step of training the pass before reads the same `xt`, without gradient; in
the others nothing is expected. A decoder has the prediction of its last step, at no cost, and so has PUMA's pool.

Dimensions: B rows, L positions, M scored positions, D width.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask import noise
from unmask.noise import Purpose


def is_told(seed: int, step: int | None) -> bool:
    """Whether this step of training has an estimate: one of the steps 2 i and 2 i + 1, either with probability 1/2.

    A whole batch has one or not: half of the steps then have no first pass at all, shapes are the same in all of them,
    and nothing waits for the device. `step=None`, which is no training, always has one.
    """
    return step is None or noise.integer(seed, Purpose.SELF_CONDITION, step // 2) % 2 == step % 2


def placed(
    values: Float[Tensor, "M D"], scored: Int[Tensor, "M"], is_masked: Bool[Tensor, "B L"]
) -> Float[Tensor, "B L D"]:
    """`values` at the flat positions `scored` that are masked, 0 elsewhere. One past the end, there may be padding."""
    flat = values.new_zeros(is_masked.numel() + 1, values.shape[1])
    dense = flat.index_copy(0, scored, values)[:-1].unflatten(0, is_masked.shape)
    return torch.where(is_masked.unsqueeze(-1), dense, 0.0)
