"""Measures which attention backend trains fastest on this CPU.

It does so in another process, because the memory that compiling leaves behind would otherwise stay with the run. As a
program (`python -m unmask.models.measuring`) it takes a `Case` as JSON and prints the name of the fastest backend.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from unmask.models.attention import Attention
from unmask.models.backends import BACKENDS, FEW_BLOCKS
from unmask.models.visibility import AttentionPattern, num_clean

_CANDIDATES = ("sdpa", "matmul")
_LONGEST = 1024  # the L x L factors that plain products keep would fill the memory of longer rows
_TIMEOUT = 300.0  # seconds; a compiler may take one of these minutes


@dataclass(frozen=True)
class Case:
    """Sizes of queries, keys and values, number format and threads of a measurement."""

    rows: int
    heads: int
    length: int
    width: int
    dtype: str
    threads: int
    block_size: int | None = None
    """S of `AttentionPattern`. With two streams `length` counts both."""
    noisy: int = 0


def measure_fastest(model: nn.Module, *, rows: int, length: int, dtype: torch.dtype) -> str | None:
    """Returns the backend whose compiled forward and backward pass takes the least time, at the sizes of `model`.

    None if there is nothing to choose (no `Attention`, one whose backend is set, rows too long for `matmul` or with too
    many blocks for `sdpa`), or if the measurement failed.
    """
    own = [module for module in model.modules() if isinstance(module, Attention)]
    if not own or own[0].backend != "auto" or length > _LONGEST:
        return None
    noisy, size = 0, own[0].seen.size
    if getattr(model, "block_size", None) is not None and size is not None:
        if length > FEW_BLOCKS * size:
            return None
        noisy, length = length, length + num_clean(length, size)
    name = str(dtype).removeprefix("torch.")
    case = Case(rows, own[0].num_heads, length, own[0].head_dim, name, torch.get_num_threads(), size, noisy)
    command = [sys.executable, "-P", "-m", "unmask.models.measuring", json.dumps(asdict(case))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split()[-1]


def measure(case: Case) -> str:
    """Returns the name of the fastest backend."""
    torch.set_num_threads(case.threads)
    seconds = {name: _seconds(torch.compile(BACKENDS[name], dynamic=False), case) for name in _CANDIDATES}
    return min(seconds, key=lambda name: seconds[name])


def _seconds(run: Callable[[Tensor, Tensor, Tensor, float, AttentionPattern], Tensor], case: Case) -> float:
    """Returns the time of the fastest of a few forward and backward passes."""
    shape, dtype = (case.rows, case.heads, case.length, case.width), getattr(torch, case.dtype)
    x = torch.zeros(3, *shape, dtype=dtype, requires_grad=True)
    gradient = torch.zeros(shape, dtype=dtype)
    seen = AttentionPattern(case.block_size, case.noisy)
    best = math.inf  # the first pass compiles, and others may be disturbed: the minimum is the stable number
    for _ in range(5):
        started = time.perf_counter()
        run(x[0], x[1], x[2], 0.0, seen).backward(gradient)
        best = min(best, time.perf_counter() - started)
    return best


if __name__ == "__main__":
    print(measure(Case(**json.loads(sys.argv[1]))))
