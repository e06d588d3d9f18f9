"""The memory that models and rows need: at least, so that what cannot fit is refused before it is paid, and about.

What is required are lower bounds, of whole numbers, which do not overflow: what is refused would not have fitted.
`training_memory` and `decoding_memory` estimate the peak.
"""

from collections.abc import Collection
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from unmask.config.settings import Section
from unmask.machine import require_memory
from unmask.models.head import CHUNK
from unmask.models.transformer_config import TransformerConfig
from unmask.types import TokenSpec

_GIB = 2**30
_SIZES = {"bfloat16": 2, "float32": 4, "float64": 8}
_BYTES = 4  # of a parameter, and of what an optimizer keeps of it: fp32, also beside bfloat16
_ROW_BYTES = 17  # of a position of a batch: x0 and xt as int64, and the mask of the prompt
_ACTIVATION_BYTES = 2  # of a channel, in bfloat16
_LOGIT_BYTES = 17  # of a logit at work: beside itself its fp32 copies, or its index


def count_parameters(config: TransformerConfig, tokens: TokenSpec) -> int:
    """Counts the parameters of the transformer that `config` describes, without building it."""
    dim, width = config.dim, config.head_width
    queries, keys = config.num_heads * width, config.key_heads * width
    attention = dim * (2 * queries + 2 * keys)
    biases = (queries + 2 * keys) * config.qkv_bias + dim * config.out_bias
    norms = 2 * dim + 2 * width * config.qk_norm
    per_layer = attention + biases + norms + 3 * dim * config.ff_dim
    return config.num_layers * per_layer + _outside(config, tokens) + dim + dim * dim * config.self_conditioning


def count_trained(config: TransformerConfig, tokens: TokenSpec) -> int:
    """Counts the parameters that have a gradient: all, or those of the adapters and the mask token's row."""
    if config.lora is None:
        return count_parameters(config, tokens)
    dim, width = config.dim, config.head_width
    queries, keys = config.num_heads * width, config.key_heads * width
    sizes = {"q": dim + queries, "k": dim + keys, "v": dim + keys, "out": queries + dim}
    sizes |= dict.fromkeys(("gate", "up", "down"), dim + config.ff_dim)
    return config.num_layers * config.lora.rank * sum(sizes[name] for name in config.lora.targets) + dim


def count_held_bytes(config: TransformerConfig, tokens: TokenSpec) -> int:
    """Counts the bytes of the weights that `count_trained` leaves out, of which nothing else is kept.

    In nf4, 64 numbers share a scale of a byte, and 256 scales a scale of their own of four.
    """
    if config.lora is None:
        return 0
    inside = _inside(config, tokens)
    outside = _outside(config, tokens)
    of_4096 = {"float32": 16384, "bfloat16": 8192, "nf4": 2048 + 64 + 1}[config.lora.base]
    return inside * of_4096 // 4096 + outside * (4 if config.lora.base == "float32" else 2)


def require_memory_for_model(
    config: Section, tokens: TokenSpec, *, device: torch.device | None = None, copies: int = 1, shards: int = 1
) -> None:
    """Checks that the parameters can fit.

    Args:
        config: the settings of the model; those of a model of the user's own say nothing of its size.
        tokens: its tokens.
        device: where it goes. What is drawn is built on the CPU; a frozen base goes there as it is read.
        copies: numbers that are kept for each trained parameter: 1, and for training its gradient, moments and average.
        shards: processes that share the copies.

    Raises:
        UserError: they need more than there is.
    """
    if not isinstance(config, TransformerConfig):
        return
    angles = tokens.length * config.head_width * _BYTES if config.rotary else 0
    sizes = f"model.num_layers={config.num_layers}, model.dim={config.dim}, {tokens.vocab_size} tokens"
    what = f"a model of {min(count_parameters(config, tokens), 10**300):.3g} parameters ({sizes})"
    fix = "take fewer layers, narrower ones, or a smaller vocabulary"
    require_memory(count_trained(config, tokens) * _BYTES + angles, what, fix)
    if copies > 1:
        what = f"training {what}, {copies} numbers for each that is trained,"
    needed = count_held_bytes(config, tokens) + count_trained(config, tokens) * _BYTES * copies // shards
    require_memory(needed, what, fix, limit=_limit(device))


def require_memory_for_weights(weights: Collection[Tensor], device: torch.device) -> None:
    """Checks that weights of these shapes and formats can fit on `device`.

    Raises:
        UserError: they need more than there is.
    """
    needed, count = sum(each.nbytes for each in weights), sum(each.numel() for each in weights)
    what = f"a model of {count:.3g} parameters, with {needed // max(1, count)} bytes each,"
    require_memory(needed, what, "use a device with more, or a smaller model", limit=_limit(device))


def require_memory_for_rows(
    config: Section,
    tokens: TokenSpec,
    *,
    rows: int,
    at_once: int,
    trained: bool,
    what: str,
    device: torch.device | None = None,
) -> None:
    """Checks that rows can fit: their tokens and, of those read `at_once`, what a model keeps.

    Raises:
        UserError: they need more than there is; the message begins with `what`.
    """
    needed = rows * tokens.length * _ROW_BYTES
    if isinstance(config, TransformerConfig):
        layers = _count_runs(config) if trained else 1  # each run keeps its input until the backward pass
        needed += at_once * tokens.length * config.dim * layers * _ACTIVATION_BYTES
    require_memory(needed, f"{what}, rows of {tokens.length} tokens,", "take fewer rows", limit=_limit(device))


def count_cached(config: TransformerConfig, tokens: TokenSpec, loops: int | None = None) -> int:
    """Counts the numbers that a cache keeps of a row: keys and values of every position and run of a layer."""
    return 2 * _count_runs(config, loops) * config.key_heads * config.head_width * tokens.length


def _count_runs(config: TransformerConfig, loops: int | None = None) -> int:
    """Counts the layers of a pass that runs `model.loops` so often; default: as often as training at most."""
    return config.loops.count(config.num_layers, loops) if config.loops else config.num_layers


def require_memory_for_decoding(
    config: Section | None,
    tokens: TokenSpec,
    *,
    rows: int,
    is_cached: bool,
    loops: int | None = None,
    what: str,
    dtype: str = "auto",
    device: torch.device | None = None,
) -> None:
    """Checks that canvases can fit that are decoded at once: their tokens and, of a transformer, what it computes.

    That is the keys and values of all positions with a cache, and the vectors of one layer without.

    Args:
        config: the settings of the model, if it has any; those of a model of the user's own say nothing of its size.
        tokens: its tokens.
        rows: canvases.
        is_cached: keys and values are kept from step to step.
        loops: how often `model.loops` are run; default: as often as in training at most.
        what: names the rows, as the start of the message.
        dtype: number format of the model; auto: 16 bits at least.
        device: where they are decoded.

    Raises:
        UserError: they need more than there is.
    """
    needed = rows * tokens.length * _ROW_BYTES
    if isinstance(config, TransformerConfig):
        numbers = count_cached(config, tokens, loops) if is_cached else tokens.length * config.dim
        needed += rows * numbers * {"float64": 8, "float32": 4}.get(dtype, _ACTIVATION_BYTES)
        what += " with the keys and values that are kept of them" * is_cached
    require_memory(needed, f"{what}, {tokens.length} tokens each,", "take fewer at once", limit=_limit(device))


@dataclass(frozen=True)
class Memory:
    """Bytes on the device at the peak, by what needs them."""

    weights: int
    updates: int = 0
    """Gradients, the optimizer's moments, the average."""
    cache: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.updates + self.cache + self.activations

    def __str__(self) -> str:
        parts = [f"{each.name} {getattr(self, each.name) / _GIB:.1f}" for each in fields(self)]
        return f"{self.total / _GIB:.1f} GiB ({', '.join(parts)})"


def training_memory(
    config: TransformerConfig,
    tokens: TokenSpec,
    *,
    rows: int,
    dtype: str = "bfloat16",
    copies: int = 5,
    scored: int | None = None,
) -> Memory:
    """Estimates the memory of a training step.

    All of a canvas is read, and at worst all is scored, however much of it is padding. With checkpoints the input of
    every block is kept, and everything of the one that is computed again; else everything of all of them. Attention is
    taken to be fused.

    Args:
        config: the settings of the model.
        tokens: its tokens.
        rows: rows that are read at once, those of a micro-batch.
        dtype: number format that it computes in.
        copies: numbers for each trained one: itself, its gradient, two moments of AdamW, and the average, if any.
        scored: positions that are predicted at once; default: all.
    """
    size = _SIZES[dtype]
    wide, positions = max(_BYTES, size), rows * _positions_read(config, tokens)
    trained = count_trained(config, tokens)
    runs = _count_runs(config)
    # Casts of the weights to what is computed in are kept for the backward pass: of all blocks, or of the one at work.
    casts = _inside(config, tokens) if config.lora is None and size < _BYTES else 0
    if config.lora is not None and config.lora.base != "nf4" and _SIZES[config.lora.base] != size:
        casts = _inside(config, tokens) // (config.num_layers if config.checkpointing else 1)
    block = positions * _kept_of_position(config, size)
    gradients = positions * (3 * config.ff_dim * size + 2 * config.dim * wide)
    scored = rows * tokens.length if scored is None else scored
    head = scored * (min(CHUNK, tokens.vocab_size) * _LOGIT_BYTES + config.dim * (2 * wide + 2 * _BYTES + 2 * size))
    if config.lora is None:
        head += tokens.vocab_size * config.dim * _BYTES  # its own gradient, beside the sum of those before
    if config.checkpointing:  # a block is computed again after the head has gone
        activations = runs * positions * config.dim * wide + max(head, block + gradients)
    else:
        activations = runs * block + max(head, gradients)
    return Memory(
        weights=count_held_bytes(config, tokens) + trained * _BYTES + casts * size,
        updates=trained * _BYTES * (copies - 1),
        activations=activations,
    )


def _positions_read(config: TransformerConfig, tokens: TokenSpec) -> int:
    """Counts the positions of a row that a training step reads: in blocks, those of two streams."""
    return tokens.length * 2 - config.block_size if config.block_size else tokens.length


def _kept_of_position(config: TransformerConfig, size: int) -> int:
    """Counts the bytes that a block keeps of a position for its backward pass."""
    wide = max(_BYTES, size)
    heads, groups = config.num_heads, config.key_heads
    queries, keys = heads * config.head_width, groups * config.head_width
    # The stream before attention and before the SwiGLU, each also normalised: before it is weighted, and rounded.
    stream = config.dim * (4 * wide + 2 * size)
    # Values are a part of what was projected; groups are repeated for their heads, and their own are dropped.
    attended = 3 * queries if groups < heads else 3 * queries + 2 * queries * config.rotary
    normed = 2 * (queries + keys) * wide * config.qk_norm
    inner = 4 * config.ff_dim
    return stream + (attended + 2 * queries + inner) * size + normed + heads * _BYTES


def decoding_memory(
    config: TransformerConfig,
    tokens: TokenSpec,
    *,
    rows: int,
    is_cached: bool,
    dtype: str = "bfloat16",
    held: str = "bfloat16",
) -> Memory:
    """Estimates the memory of decoding: weights, cache, and one block at work, whatever the number of layers.

    Args:
        config: the settings of the model.
        tokens: its tokens.
        rows: canvases that are decoded at once; all of them are read whole, once at least.
        is_cached: keys and values are kept from step to step.
        dtype: number format that it computes in.
        held: that of the weights: bfloat16 for a checkpoint in it, else float32, which keeps rounded copies beside it.
    """
    size, count = _SIZES[dtype], count_parameters(config, tokens)
    wide = size if held == dtype else max(_BYTES, size)
    heads, groups = config.num_heads, config.key_heads
    queries, keys = heads * config.head_width, groups * config.head_width
    stream, projected = 3 * config.dim * wide, (queries + 2 * keys) * size
    positions = rows * tokens.length
    repeated = 2 * queries * size * (groups < heads)
    rotated = (queries + keys) * size + 2 * keys * max(_BYTES, size)
    joined = (queries + 2 * keys) * config.dim * size  # the weights of queries, keys and values, side by side
    logits = min(CHUNK, tokens.vocab_size) * (_LOGIT_BYTES - 3)
    phases = [
        joined + positions * (stream + projected),
        positions * (stream + projected + max(rotated, repeated + 2 * queries * size)),
        positions * (stream + 3 * config.ff_dim * size),
        positions * (config.dim * wide + logits),
    ]
    return Memory(
        weights=count * _SIZES[held] + (_inside(config, tokens) * size if wide > size else 0),
        cache=rows * count_cached(config, tokens) * size * is_cached,
        activations=max(phases),
    )


def _inside(config: TransformerConfig, tokens: TokenSpec) -> int:
    """Counts the parameters that are neither in the embeddings nor in the head."""
    return count_parameters(config, tokens) - _outside(config, tokens)


def _outside(config: TransformerConfig, tokens: TokenSpec) -> int:
    """Counts the parameters of the embeddings and the head."""
    rows = tokens.vocab_size * (1 if config.tied_head else 2) + tokens.length * config.learned_positions
    return config.dim * rows


def _limit(device: torch.device | None) -> int | None:
    """Returns the bytes of the GPU `device`; None for the machine's."""
    if device is None or device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)
