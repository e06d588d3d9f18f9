"""Masked diffusion language models: training with PUMA and its baselines, and decoding."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmask.public import *


def __getattr__(name: str) -> Any:
    # The public names come with PyTorch, which takes seconds: the command line must be there before, to hear signals.
    is_special = name.startswith("__") and name != "__all__"
    if is_special or find_spec(f"{__name__}.{name}") is not None:  # a module, which Python then imports by itself
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from unmask import public

    return getattr(public, name)


def __dir__() -> list[str]:
    from unmask import public

    return [*globals(), *public.__all__]
