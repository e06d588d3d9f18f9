"""Which number formats a model computes in.

Whether `torch.compile` works here.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

from unmask.progress import warn


def resolve_dtype(name: str, device: torch.device) -> str:
    """`auto` becomes bfloat16 where the hardware multiplies it, else float32; other names stay.

    A CPU without such instructions runs bfloat16 too, several times slower than float32.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if device.type == "cpu" and _cpu_has_bf16() else "float32"


def _cpu_has_bf16() -> bool:
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)


def parameter_dtype(name: str) -> torch.dtype:
    """Parameters stay in fp32 under bfloat16: only the matrix products are rounded."""
    return torch.float64 if name == "float64" else torch.float32


def autocast(name: str, device: torch.device) -> AbstractContextManager[object]:
    """The context in which the model is called."""
    return torch.autocast(device.type, torch.bfloat16) if name == "bfloat16" else nullcontext()


def should_compile(setting: str | bool, device: torch.device) -> bool:
    """`auto` becomes True where a compiler works, else False with one line that says so; True and False stay."""
    if setting != "auto":
        return bool(setting)
    try:
        torch.compile(_probe, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # whatever a missing compiler, header or kernel language raises
        reason = str(error).strip().partition("\n")[0]
        warn(f"training runs uncompiled, which is slower: {reason}; train.compile=false hides this line")
        return False
    return True


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1
