"""The decoder that a model and a configuration call for."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from unmask.config import DecodeConfig
from unmask.decoding.causal import CausalDecoder
from unmask.decoding.decoder import Decoder
from unmask.errors import UserError
from unmask.models.denoiser import Denoiser
from unmask.types import Decoded, TokenSpec


@runtime_checkable
class AnyDecoder(Protocol):
    """What `unmask` asks of a decoder; see `Decoder`."""

    @property
    def mask_id(self) -> int: ...

    def decode(self, xt: Int[Tensor, "B L"], prompt: Int[Tensor, "B"] | None = None) -> Decoded: ...

    def steps(self, xt: Int[Tensor, "B L"], prompt: Int[Tensor, "B"] | None = None) -> Iterator[Decoded]: ...


def build_decoder(config: DecodeConfig, model: Denoiser, tokens: TokenSpec) -> AnyDecoder:
    """Left to right and with a cache for a causal model; in any order for the others.

    Raises:
        UserError: another order than left to right is asked of a causal model.
    """
    if not model.is_causal:
        return Decoder.from_config(config, model.predict, tokens.mask_id)
    for key, value, needed in (
        ("confidence", config.confidence, "left_to_right"),
        ("tokens_per_step", config.tokens_per_step, 1),
        ("steps", config.steps, None),
        ("confidence_noise", config.confidence_noise, 0.0),
    ):
        if value != needed:
            raise UserError(
                f"decode.{key}={value}: a causal model decodes left to right, a token a step; "
                f"set decode.{key}={'null' if needed is None else needed}"
            )
    return CausalDecoder(model, tokens.mask_id, eos_id=tokens.eos_id, temperature=config.temperature, seed=config.seed)
