"""The native backbone: a pre-norm transformer, bidirectional, causal or block-causal, without a time embedding.

(The masked positions tell the optimal prediction all it needs to know of t: Ou et al. 2024, 2406.03736.)

Dimensions: B rows, L positions in blocks of S, M selected positions, n positions read beside a cache, D width; W
positions of one stream or two.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unmask import noise
from unmask.models.attention import Attention, KeyValueCache, LayerCache, RmsNorm, rotary_angles, select_positions
from unmask.models.loops import in_order
from unmask.models.tied import TiedGradient, lookup
from unmask.models.transformer_config import TransformerConfig
from unmask.models.visibility import num_clean
from unmask.types import TokenSpec


class Transformer(nn.Module):
    """A network from tokens (B, L) to normalised hidden states (M, D); their products with `head_weight` are logits."""

    Config = TransformerConfig
    EMBEDDINGS = ("embedding.weight", "positions.weight")
    STARTS_AT_ZERO = ("conditioning.weight",)
    """Optional weights that start at 0, so that the network is at first the one without them."""
    cos: Tensor
    sin: Tensor
    times: int | None = None
    """How often `model.loops` are run now; None: as often as the settings say at most."""
    tied: TiedGradient | None = None
    """Slot for the gradient of a tied head; whoever computes the head sets a new one before every forward pass."""

    def __init__(self, config: TransformerConfig, tokens: TokenSpec) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(tokens.vocab_size, config.dim)
        self.positions = nn.Embedding(tokens.length, config.dim) if config.learned_positions else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RmsNorm(config.dim, eps=config.norm_eps)
        self.head = None if config.tied_head else nn.Linear(config.dim, tokens.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.conditioning = nn.Linear(config.dim, config.dim, bias=False) if config.self_conditioning else None
        if config.rotary:
            dtype = torch.promote_types(self.embedding.weight.dtype, torch.float32)
            cos, sin = self._angles(tokens.length, dtype)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    def _angles(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        config = self.config
        return rotary_angles(length, config.head_width, config.rope_theta, dtype, layout=config.rotary_layout)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Transformer":
        """Converts or moves the network; angles are computed anew for fp64, and stay fp32 where weights are rounded."""
        before = self.cos.dtype if self.config.rotary else None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.config.rotary and self.cos.dtype not in (before, torch.float32):
            dtype = torch.promote_types(self.cos.dtype, torch.float32)
            self.cos, self.sin = (each.to(self.cos.device) for each in self._angles(len(self.cos), dtype))
        return self

    @classmethod
    def from_config(cls, config: TransformerConfig, tokens: TokenSpec) -> "Transformer":
        return cls(config, tokens)

    @staticmethod
    def shape_of(source: str) -> dict[str, Any] | None:
        """Returns the settings of the Hugging Face checkpoint `source`; `None` if it is none."""
        from unmask.models import hf

        return hf.read_model_settings(source) if hf.is_checkpoint(source) else None

    @property
    def is_causal(self) -> bool:
        return self.config.causal

    @property
    def block_size(self) -> int | None:
        return self.config.block_size

    @property
    def is_tied(self) -> bool:
        return self.head is None

    @property
    def head_weight(self) -> Float[Tensor, "V D"]:
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def is_self_conditioned(self) -> bool:
        return self.config.self_conditioning

    def forward(
        self, xt: Int[Tensor, "B L"], at: Int[Tensor, "M"], estimate: Float[Tensor, "B L D"] | None = None
    ) -> Float[Tensor, "M D"]:
        """Computes hidden states at the flat positions `at`.

        `estimate` is the expected embedding of each position, for a self-conditioned network; None: no estimate.
        """
        return self._read(xt, at, estimate=estimate)

    def two_streams(
        self,
        xt: Int[Tensor, "B L"],
        x0: Int[Tensor, "B L"],
        at: Int[Tensor, "M"],
        estimate: Float[Tensor, "B L D"] | None = None,
    ) -> Float[Tensor, "M D"]:
        """Reads `[xt ; x0]` in one pass: a block of `xt` sees itself and the blocks of `x0` before it.

        `x0` sees no `xt`. No position sees the last block of `x0`, so it is left out: `at` are flat positions of
        (B, 2 L - S). With one block this is `forward(xt, at)`. (Arriola et al. 2025, 2503.09573.) `estimate` is for
        the positions of `xt`.
        """
        assert self.block_size is not None, "two streams are for block models"
        length = xt.shape[1]
        tokens = torch.cat([xt, x0[:, : num_clean(length, self.block_size)]], dim=1)
        if estimate is not None:
            estimate = F.pad(estimate, (0, 0, 0, tokens.shape[1] - length))
        return self._read(tokens, at, noisy=length, estimate=estimate)

    def _read(
        self,
        tokens: Int[Tensor, "B W"],
        at: Int[Tensor, "M"],
        noisy: int = 0,
        estimate: Float[Tensor, "B W D"] | None = None,
    ) -> Float[Tensor, "M D"]:
        """Computes hidden states of one stream, or of two of which the first has `noisy` positions."""
        clean = tokens.shape[1] - noisy

        def by_place(table: Tensor) -> Tensor:
            """Selects the entries of all positions; both streams start at place 0."""
            return torch.cat([table[:noisy], table[:clean]]) if noisy else table[:clean]

        x = self._add_estimate(self._embed(tokens), estimate)
        if self.positions is not None:
            x = x + by_place(self.positions.weight)
        x = self.dropout(x)
        angles = (by_place(self.cos), by_place(self.sin)) if self.config.rotary else None
        *blocks, last = in_order(self.blocks, self.config.loops, self.times)
        for block in blocks:
            x = self._run(block, x, angles, None, noisy)
        # No later block reads the last one's other positions, so it computes `at` alone.
        return self.norm(self._run(last, x, angles, at, noisy))

    def extend(
        self,
        tokens: Int[Tensor, "B n"],
        position: Int[Tensor, "B n"],
        cache: KeyValueCache,
        rows: Int[Tensor, "B"] | None = None,
        estimate: Float[Tensor, "B n D"] | None = None,
    ) -> Float[Tensor, "B n D"]:
        """Computes hidden states of `tokens` at `position`, beside the cached positions, and adds them to the cache.

        Args:
            tokens: tokens of B canvases.
            position: their positions; cached entries there are replaced.
            cache: keys and values of everything else that the tokens see.
            rows: rows of the cache that these canvases are; None: all.
            estimate: as in `forward`, for `tokens`.
        """
        seen, length = self.config.seen, cache.length
        stop = length if seen.size is None else int(seen.visible_until(position).max())  # waits for the device
        cache.width = max(cache.width, min(length, stop))
        x = self._add_estimate(self._embed(tokens), estimate)
        if self.positions is not None:
            x = x + self.positions.weight[position]
        angles = (self.cos[position].unsqueeze(1), self.sin[position].unsqueeze(1)) if self.config.rotary else None
        for number, block in enumerate(in_order(self.blocks, self.config.loops, self.times)):
            x = block.extend(x, angles, position, cache.layer(number), rows)
        return self.norm(x)

    def _run(self, block: nn.Module, *arguments: Any) -> Tensor:
        if self.config.checkpointing and self.training:
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def _embed(self, xt: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        is_tied = self.head is None and self.embedding.weight.requires_grad  # a frozen one has no gradient to share
        return self._embed_tied(xt) if is_tied else self.embedding(xt)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _embed_tied(self, xt: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        # Not compiled: the slot `tied` is another object in every step.
        return lookup(xt, self.embedding.weight, self.tied)

    def _add_estimate(
        self, x: Float[Tensor, "B L D"], estimate: Float[Tensor, "B L D"] | None
    ) -> Float[Tensor, "B L D"]:
        """Adds `W estimate`, which is 0 where the estimate is."""
        if estimate is None:
            return x
        assert self.conditioning is not None, "an estimate is for a self-conditioned network"
        return x + self.conditioning(estimate)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draws every matrix from a normal distribution with standard deviation `1 / sqrt(inputs)`; biases are 0.

        That of embeddings is `embedding_std`, if set; that of projections onto the residual stream is divided by
        `sqrt(2 layers)`, as in GPT-2. A fixed 0.02 is far too small for narrow models, which then stay for hundreds of
        steps at the loss of a blind guess. The weights `STARTS_AT_ZERO` start at 0.

        With `init=zero` projections onto the residual stream start at 0 too: each block adds nothing at first.

        With `init=reference` matrices and biases are uniform in +-`1 / sqrt(inputs)`, and embeddings have standard
        deviation 1. A tied head then begins with logits of standard deviation `sqrt(dim)`: far above log V.
        """
        is_reference = self.config.init == "reference"
        for name, parameter in self.named_parameters():
            generator = noise.generator(seed, name, parameter.device)
            is_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            is_zero = name in self.STARTS_AT_ZERO or (is_residual and self.config.init == "zero")
            if is_zero or (name.endswith("bias") and not is_reference):
                parameter.zero_()
            elif parameter.ndim == 1 and not name.endswith("bias"):
                parameter.fill_(1.0)
            elif is_reference and name in self.EMBEDDINGS:
                parameter.normal_(0.0, self.config.embedding_std or 1.0, generator=generator)
            elif is_reference:
                layer: Any = self.get_submodule(name.rpartition(".")[0])
                bound = layer.in_features**-0.5
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                std = (parameter.shape[1] * (2 * self.config.num_layers if is_residual else 1)) ** -0.5
                if name in self.EMBEDDINGS:
                    std = self.config.embedding_std or std
                parameter.normal_(0.0, std, generator=generator)


class Block(nn.Module):
    """A pre-norm block: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(
            config.dim,
            config.num_heads,
            config.key_heads,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            dropout=config.dropout,
            backend=config.attention,
            seen=config.seen,
            head_dim=config.head_dim,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
        )
        self.mlp_norm = RmsNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGlu(config.dim, config.ff_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "B W D"],
        angles: tuple[Tensor, Tensor] | None,
        at: Int[Tensor, "M"] | None = None,
        noisy: int = 0,
    ) -> Float[Tensor, "B W D"] | Float[Tensor, "M D"]:
        """Computes the block; with `at`, at these flat positions alone, for which all others give keys and values."""
        x = select_positions(x, at) + self.dropout(self.attention(self.attention_norm(x), angles, at, noisy))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

    def extend(
        self,
        x: Float[Tensor, "B n D"],
        angles: tuple[Tensor, Tensor] | None,
        position: Int[Tensor, "B n"],
        known: LayerCache,
        rows: Int[Tensor, "B"] | None,
    ) -> Float[Tensor, "B n D"]:
        """Computes the block for positions that are read beside the cached ones, `known`."""
        x = x + self.attention.extend(self.attention_norm(x), angles, position, known, rows)
        return x + self.mlp(self.mlp_norm(x))


class SwiGlu(nn.Module):
    """A SwiGLU layer: `down(silu(gate(x)) * up(x))` (Shazeer 2020, 2002.05202)."""

    def __init__(self, dim: int, ff_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, ff_dim, bias=False)
        self.up = nn.Linear(dim, ff_dim, bias=False)
        self.down = nn.Linear(ff_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        return self.down(F.silu(self.gate(x)) * self.up(x))
