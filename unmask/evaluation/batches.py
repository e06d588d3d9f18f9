"""Which examples a process evaluates together."""

from collections.abc import Sequence

import torch
from torch import Tensor


def batches_of(count: int, share: slice, batch_size: int) -> Sequence[Tensor]:
    """The numbers of those of `count` examples that are in `share`, `batch_size` at a time; no batch is empty.

    (`split` makes one empty batch of nothing, which a process has where there are more of them than examples.)
    """
    own = torch.arange(count)[share]
    return own.split(batch_size) if len(own) else ()
