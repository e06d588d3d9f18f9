"""Builds the decoder for a model from the settings of a section `decode`."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from jaxtyping import Int
from torch import Tensor

from unmask.decoding.config import DecodeConfig, without_loops
from unmask.decoding.decoder import Decoder
from unmask.decoding.remasking import REMASKINGS
from unmask.decoding.sampling import Sampling
from unmask.decoding.windows import (
    BlockWindow,
    Cached,
    CausalWindow,
    DualWindow,
    FullCanvas,
    Guided,
    HiddenStateReader,
    Looped,
    NoCache,
    OpenReader,
    PrefixWindow,
    SelfConditioned,
    UpToBlock,
    UpToOwnBlock,
    Window,
)
from unmask.errors import UserError
from unmask.models.cost import require_memory_for_decoding
from unmask.models.denoiser import Denoiser
from unmask.models.loops import loops_of
from unmask.progress import warn
from unmask.types import TokenSpec


def build_decoder(config: DecodeConfig, model: Denoiser, tokens: TokenSpec, *, rows: int = 1) -> Decoder:
    """Builds the decoder of `config` for `model`; a causal model's reads each token once.

    Args:
        config: the settings.
        model: the model, where it will decode.
        tokens: its tokens.
        rows: canvases that will be decoded, `config.batch_size` of them at once.

    Raises:
        UserError: an order, blocks, a cache or guidance that the model cannot have, forbidden tokens that are not
            there, or more canvases at once than can fit.
    """
    if model.is_causal:
        _check_causal(config)
    _check_blocks(config, model, tokens)
    _check_not_self_conditioned(config, model)
    _check_forbidden(config.forbid, tokens)
    if config.loops is not None and loops_of(model.backbone) is None:
        raise UserError(without_loops(config.loops))
    require_memory_for_decoding(
        getattr(model.backbone, "config", None),
        tokens,
        rows=min(rows, config.batch_size),
        is_cached=model.is_causal or config.cache != "none",
        loops=config.loops,
        what=f"decode.batch_size={config.batch_size}: {min(rows, config.batch_size)} canvases",
        dtype=config.dtype or "auto",  # the model may be set to its format later
        device=next(model.parameters()).device,
    )
    pads_with_eos = model.is_causal or tokens.pad_id == tokens.eos_id
    can_end = config.stop_early and config.remask == "none" and pads_with_eos
    return Decoder(
        model.predict,
        tokens.mask_id,
        order=config.order,
        rule=config.rule(),
        sampling=Sampling.from_config(config),
        confidence_noise=config.confidence_noise,
        block_size=1 if model.is_causal else model.block_size or config.block_size,
        eos_id=tokens.eos_id if can_end else None,
        remasking=REMASKINGS[config.remask](config.remask_eta) if config.remask != "none" else None,
        open_reader=_open_reader(config, model),
    )


def about_compiling(config: DecodeConfig, model: Denoiser) -> str | None:
    """Says that `decode.compile` has no effect, where every pass reads part of a canvas beside a cache; else None."""
    if not config.compile or (config.cache == "none" and not model.is_causal):
        return None
    cause = "a causal model" if model.is_causal else f"decode.cache={config.cache}"
    return f"without effect: decode.compile=true ({cause} reads a part of the canvas beside a cache, uncompiled)"


def _open_reader(config: DecodeConfig, model: Denoiser) -> OpenReader:
    if (times := config.loops) is not None:
        open_inner = _open_reader(config.model_copy(update={"loops": None}), model)
        return lambda xt: Looped(open_inner(xt), model, times)
    if config.guidance:
        return partial(Guided, model, config.guidance)
    if model.is_self_conditioned:
        return lambda xt: SelfConditioned(_open_hidden_reader(config, model, xt), xt)
    if config.cache != "none" or model.block_size is not None or model.is_causal or not config.reads_ahead:
        return lambda xt: _open_hidden_reader(config, model, xt)
    return lambda xt: NoCache(model.predict)


def _open_hidden_reader(config: DecodeConfig, model: Denoiser, xt: Int[Tensor, "B L"]) -> HiddenStateReader:
    if model.is_causal:
        return Cached(model, CausalWindow(xt, model.mask_id), xt)
    if config.cache != "none":
        return Cached(model, _WINDOWS[config.cache](xt, config.refresh_every), xt)
    if model.block_size is not None:
        return UpToBlock(model)
    return FullCanvas(model) if config.reads_ahead else UpToOwnBlock(model)


_WINDOWS: dict[str, Callable[[Int[Tensor, "B L"], int | None], Window]] = {
    "block": lambda xt, every: BlockWindow(xt),
    "prefix": PrefixWindow,
    "dual": DualWindow,
}


def _check_blocks(config: DecodeConfig, model: Denoiser, tokens: TokenSpec) -> None:
    own, asked = model.block_size, config.block_size
    if own is not None and asked not in (None, own):
        raise UserError(f"decode.block_size={asked}: this model was trained in blocks of {own}; set {own}, or null")
    if asked is not None and asked > tokens.length:
        raise UserError(f"decode.block_size={asked}: longer than the {tokens.length} positions of a row; use fewer")
    if asked is not None and own is None and tokens.length % asked:
        _warn_of_shorter(asked, tokens.length)
    if config.cache == "block" and own is None:
        raise UserError(
            "decode.cache=block: this model sees all positions, so that what it remembers of a block goes out of date; "
            "use prefix or dual, which are approximate, with decode.block_size, or none"
        )
    if config.cache in ("prefix", "dual") and own is not None:
        raise UserError(f"decode.cache={config.cache}: this model sees no later blocks; use block, which is exact")


@cache
def _warn_of_shorter(size: int, length: int) -> None:
    """Says that blocks of `size` do not fill a row; once, as decoders are built again and again."""
    warn(f"decode.block_size={size} does not divide rows of {length} positions: the last block has {length % size}")


def _check_not_self_conditioned(config: DecodeConfig, model: Denoiser) -> None:
    if config.guidance and model.is_self_conditioned:
        raise UserError(
            f"decode.guidance={config.guidance}: what a self-conditioned model predicted with the prompt would reveal "
            "it where it is hidden; set decode.guidance=0"
        )


_OF_CAUSAL: dict[str, Any] = {
    "order": "left_to_right",
    **dict.fromkeys(DecodeConfig.exclusive),
    "tokens_per_step": 1,
    "confidence_noise": 0.0,
    "block_size": None,
    "cache": "none",
    "remask": "none",
    "guidance": 0.0,
}
"""The only values of these settings that a causal model can be decoded with."""


def _check_causal(config: DecodeConfig) -> None:
    for key, needed in _OF_CAUSAL.items():
        if (value := getattr(config, key)) != needed:
            raise UserError(
                f"decode.{key}={value}: a causal model decodes left to right, a token a step, with a cache of its own; "
                f"set decode.{key}={'null' if needed is None else needed}"
            )


def _check_forbidden(forbid: list[int], tokens: TokenSpec) -> None:
    if any(token >= tokens.vocab_size for token in forbid):
        raise UserError(
            f"decode.forbid={forbid}: the vocabulary has {tokens.vocab_size} tokens, 0 to {tokens.vocab_size - 1}"
        )
    if len({*forbid, tokens.mask_id}) == tokens.vocab_size:
        raise UserError(f"decode.forbid={forbid}: no token is left to write; forbid fewer")
