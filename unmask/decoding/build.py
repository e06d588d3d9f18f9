"""The decoder that a model and a configuration call for."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from unmask.config import DecodeConfig
from unmask.decoding.causal import CausalDecoder
from unmask.decoding.decoder import Decoder
from unmask.decoding.sampling import Sampling
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


_OF_CAUSAL = {
    "confidence": "left_to_right",
    "tokens_per_step": 1,
    "steps": None,
    "threshold": None,
    "factor": None,
    "entropy_bound": None,
    "confidence_noise": 0.0,
    "block_size": None,
    "cache": "none",
    "remask": "none",
    "guidance": 0.0,
}
"""What these settings must be for a causal model."""


def build_decoder(config: DecodeConfig, model: Denoiser, tokens: TokenSpec) -> AnyDecoder:
    """Left to right and with a cache for a causal model; in any order for the others.

    Raises:
        UserError: what is asked of a causal model is not left to right, or tokens are forbidden that are not there.
    """
    _check_forbidden(config.forbid, tokens)
    if not model.is_causal:
        return Decoder.from_config(config, model.predict, tokens.mask_id)
    for key, needed in _OF_CAUSAL.items():
        if (value := getattr(config, key)) != needed:
            raise UserError(
                f"decode.{key}={value}: a causal model decodes left to right, a token a step, with a cache of its own; "
                f"set decode.{key}={'null' if needed is None else needed}"
            )
    eos_id = tokens.eos_id if config.stop_early else None
    return CausalDecoder(model, tokens.mask_id, eos_id=eos_id, sampling=Sampling.from_config(config))


def _check_forbidden(forbid: list[int], tokens: TokenSpec) -> None:
    if any(token >= tokens.vocab_size for token in forbid):
        raise UserError(
            f"decode.forbid={forbid}: the vocabulary has {tokens.vocab_size} tokens, 0 to {tokens.vocab_size - 1}"
        )
    if len({*forbid, tokens.mask_id}) == tokens.vocab_size:
        raise UserError(f"decode.forbid={forbid}: no token is left to write; forbid fewer")
