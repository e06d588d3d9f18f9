"""Whether `torch.compile` works here."""

import torch

from unmask.progress import warn


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
