"""Where and in which number format a model computes, and a check that `torch.compile` works on this machine."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from unmask.errors import UserError, first_line
from unmask.noise import has_float64
from unmask.progress import warn


def resolve_device(name: str, where: str = "train.device=") -> torch.device:
    """Returns the device called `name`; `auto` is cuda if this machine has it, else mps (a Mac's GPU), else cpu.

    `where` stands before the name in errors.

    Raises:
        UserError: this machine has no such device.
    """
    cudas = torch.cuda.device_count()
    mps = ["mps"] if torch.backends.mps.is_available() else []
    valid = ["cpu", *mps, *(["cuda", *(f"cuda:{number}" for number in range(cudas))] if cudas else [])]
    if name not in ("auto", *valid):
        raise UserError(f"{where}{name}: not on this machine; use auto, {', '.join(valid)}")
    return torch.device(("cuda" if cudas else [*mps, "cpu"][0]) if name == "auto" else name)


def resolve_dtype(name: str, device: torch.device) -> str:
    """Resolves `auto` to bfloat16 if the hardware multiplies it, else to float32; other names stay.

    Raises:
        UserError: it is float64, which `device` does not have.
    """
    if name == "float64" and not has_float64(device):
        raise UserError(f"float64: {device.type} has no such numbers; use float32, or the device cpu")
    if name != "auto":
        return name
    if device.type == "mps":
        return "bfloat16" if torch.backends.mps.is_macos_or_newer(14, 0) else "float32"
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if device.type == "cpu" and _cpu_has_bf16() else "float32"


def _cpu_has_bf16() -> bool:
    # A CPU without these instructions runs bfloat16 too, several times slower than float32.
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)


def parameter_dtype(name: str) -> torch.dtype:
    """Returns the format of the parameters: fp64 in fp64, else fp32."""
    # Under bfloat16 only the matrix products are rounded: small updates would vanish in rounded parameters.
    return torch.float64 if name == "float64" else torch.float32


def autocast(name: str, device: torch.device) -> AbstractContextManager[object]:
    """Returns the context in which a model computes in `name`; a `Denoiser` enters it by itself."""
    return torch.autocast(device.type, torch.bfloat16) if name == "bfloat16" else nullcontext()


@contextmanager
def casts_kept() -> Iterator[None]:
    """Keeps autocast's bfloat16 copies of the weights from one call of a model to the next."""
    # Autocast drops its copies when the outermost context ends, here after every call: decoding with a cache would then
    # cast all weights to read one token. The weights must not change inside.
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


def should_compile(setting: str | bool, device: torch.device) -> bool:
    """Resolves `auto` to True if a compiler works, else to False with a warning; True and False stay.

    On a Mac's GPU it is False: the compiler is not finished there.
    """
    if setting != "auto":
        return bool(setting)
    if device.type == "mps":
        return False
    try:
        torch.compile(_probe, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # whatever a missing compiler, header or kernel language raises
        warn(f"training runs uncompiled, which is slower: {first_line(error)}; train.compile=false hides this line")
        return False
    return True


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1
