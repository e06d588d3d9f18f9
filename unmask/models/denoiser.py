"""The denoiser: a backbone and its head, which answer the queries of the loss, the pool and the decoder.

All that touches parameters happens in `forward` or `predict`, and only the positions asked for reach the head.

Self-conditioning (Chen et al. 2022, 2208.04202): with `p` the prediction of an earlier pass, E the embedding and W a
matrix that starts at 0, the input at a masked position is `E[mask] + W sum_v p(v) E[v]`; the sum is the estimate.
In every other training step the earlier pass reads the same `xt`, without gradient; in the others the estimate is 0. A
decoder, and PUMA's pool, take the prediction of their last step, which costs nothing.

Dimensions: B rows, L positions in blocks of S, M positions asked for, V vocabulary, D width; b of the rows of a cache.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from unmask import noise
from unmask.errors import UserError, choose
from unmask.models.attention import KeyValueCache
from unmask.models.head import expected_value, prediction, token_stats
from unmask.models.loops import depth, draw, is_drawn, repeated
from unmask.models.precision import autocast, parameter_dtype
from unmask.models.tied import TiedGradient
from unmask.models.visibility import num_clean
from unmask.noise import Purpose
from unmask.reveal import CONFIDENCES
from unmask.types import MaskedBatch, Prediction, Query, TokenStats, at_least_fp32, forbid_tokens


def has_first_pass(seed: int, step: int | None) -> bool:
    """True if this training step makes an estimate: one of the steps 2 i and 2 i + 1, either with probability 1/2.

    It is drawn for the whole batch: half of the steps then have no first pass at all, shapes are the same in all of
    them, and nothing waits for the device. Outside training (`step=None`) there always is one.
    """
    return step is None or noise.integer(seed, Purpose.SELF_CONDITION, step // 2) % 2 == step % 2


def scatter_to_canvas(
    values: Float[Tensor, "M D"], scored: Int[Tensor, "M"], is_masked: Bool[Tensor, "B L"]
) -> Float[Tensor, "B L D"]:
    """Returns `values` at the flat positions `scored` that are masked, 0 elsewhere; padding points one past the end."""
    flat = values.new_zeros(is_masked.numel() + 1, values.shape[1])
    dense = flat.index_copy(0, scored, values)[:-1].unflatten(0, is_masked.shape)
    return torch.where(is_masked.unsqueeze(-1), dense, 0.0)


NOTHING_BEFORE = (
    "model.alignment=next predicts a token from what is before it, but position 0 of an example is to be predicted; "
    "use alignment=same, or data with a prompt in every row"
)
LARGE_VOCABULARY = 8192
"""From here on `forward` never holds all logits (`models/head.py`). On a CPU in bfloat16 that is faster from about 4000
values on; in fp32, where computing the logits twice costs more, it saves memory first, and time from about 10^5 on."""


@runtime_checkable
class Backbone(Protocol):
    """A network from tokens to hidden states at the flat positions `at`, and the matrix that makes those logits.

    A class that is named in `model.name` is an `nn.Module`, and has `Config` and `from_config(config, tokens)`. It may
    have `init_weights(seed)`.
    """

    @property
    def head_weight(self) -> Float[Tensor, "V D"]: ...

    def __call__(self, xt: Int[Tensor, "B L"], at: Int[Tensor, "M"]) -> Float[Tensor, "M D"]: ...


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _in_compute_dtype(
    method: Callable[Concatenate["Denoiser", Any, _P], _R],
) -> Callable[Concatenate["Denoiser", Any, _P], _R]:
    """Runs a method of the denoiser in its `compute_dtype`, on the device of its first argument."""

    @wraps(method)
    def entered(self: "Denoiser", given: Any, /, *args: _P.args, **options: _P.kwargs) -> _R:
        if self.before_pass is not None:
            self.before_pass()
        device = given.xt.device if isinstance(given, MaskedBatch) else given.device
        with autocast(self.compute_dtype, device):
            return method(self, given, *args, **options)

    return entered


class Denoiser(nn.Module):
    """`p(x0[i] | xt)` for the positions asked for. The mask token has probability 0.

    Args:
        backbone: the network, a `Backbone`: from tokens and flat positions (M,) to hidden states (M, D).
        mask_id: the mask token.
        confidence: which statistic `forward` returns beside the NLL: a key of `reveal.CONFIDENCES`.
        alignment: where the prediction of position i is read: `same`, at i, or `next`, at i - 1, as autoregressive
            models (and what is made of them) learn it. Position 0 is then never predicted: it must be given. Only the
            denoiser shifts: loss, pool and decoder ask for position i and get the prediction of position i.
        seed: keys the noise that a model draws in training.
    """

    backbone: Any  # Backbone and nn.Module; Python has no intersection type
    before_pass: Callable[[], None] | None = None
    """Called before every pass; what it raises ends the pass. Not kept in a checkpoint."""

    def __init__(
        self,
        backbone: nn.Module,
        *,
        mask_id: int,
        confidence: str = "prob",
        alignment: str = "same",
        seed: int = 0,
    ) -> None:
        super().__init__()
        choose(CONFIDENCES, "confidence", confidence)
        if alignment not in ("same", "next"):
            raise UserError(f"alignment {alignment!r}: unknown; use same or next")
        self.backbone = backbone
        self.mask_id = mask_id
        self.confidence = confidence
        self.alignment = alignment
        self.seed = seed
        self.compute_dtype = "float32"
        self.holds_bfloat16 = False
        self._compiled: Callable[..., Tensor] | None = None
        self._compiled_prediction: Callable[[Tensor, Tensor], Tensor] | None = None

    def use_dtype(self, name: str) -> "Denoiser":
        """Computes in `name` (float32, bfloat16 or float64) from now on, with parameters in the format this asks for.

        No caller needs an autocast of its own.
        """
        self.compute_dtype = name
        is_kept = self.holds_bfloat16 and name == "bfloat16"
        return self.to(torch.bfloat16 if is_kept else parameter_dtype(name))

    def hold_bfloat16(self) -> "Denoiser":
        """Holds parameters in bfloat16 from now on, whenever it computes in that: half the memory, for reading alone.

        A published model was rounded already; updates by an optimizer would vanish in the rounding.
        """
        self.holds_bfloat16 = True
        return self.use_dtype("bfloat16")

    def compile_training(self, *, by_block: bool = False) -> None:
        """Compiles the backbone for `forward` in training; evaluation, whose shapes vary, stays as it is.

        Args:
            by_block: compile each of its blocks, between which the weights of a sharded model come and go.
        """
        if by_block or is_drawn(self.backbone):  # a graph of a block is the same however often it is run
            for block in getattr(self.backbone, "blocks", ()):
                _compile_block(block)
            return
        is_whole = self.block_size is None
        self._compiled = torch.compile(self.backbone.forward if is_whole else self.backbone.two_streams)

    def compile_decoding(self) -> None:
        """Compiles the backbone for `predict`, for any shape; takes about 30 s, which pays off on large jobs."""
        self._compiled_prediction = torch.compile(self.backbone.forward, dynamic=True)

    @_in_compute_dtype
    def forward(self, batch: MaskedBatch) -> TokenStats:
        """Returns NLL and confidence at the scored positions; a block model sees the clean blocks before theirs.

        A self-conditioned model gets its estimate from the last step where rows come back; else from a first pass over
        the same canvases, in every other step of training, and always outside it.
        """
        tied = None
        if self._is_large and getattr(self.backbone, "is_tied", False):
            tied = self.backbone.tied = TiedGradient()
        with repeated(self.backbone, draw(self.backbone, self.seed, batch.step)):
            hidden = self._hidden(batch, self._self_condition(batch))
        stats = self._stats(hidden, batch.gather(batch.x0), tied)
        if self.is_self_conditioned and batch.is_carried:
            return replace(stats, estimate=self._estimate_from(batch, hidden))
        return stats

    def _stats(self, hidden: Float[Tensor, "M D"], x0: Int[Tensor, "M"], tied: TiedGradient | None) -> TokenStats:
        if not self._is_large:
            return TokenStats.from_logits(self._head(hidden), x0, confidence=self.confidence)
        return token_stats(
            hidden,
            self.backbone.head_weight,
            x0,
            mask_id=self.mask_id,
            confidence=self.confidence,
            is_compiled=self._compiled is not None,
            tied=tied,
        )

    @property
    def is_causal(self) -> bool:
        """True if a prediction depends on earlier positions alone."""
        return getattr(self.backbone, "is_causal", False)

    @property
    def block_size(self) -> int | None:
        """S, if a prediction depends on the position's block of S and those before it; None: on all positions."""
        return getattr(self.backbone, "block_size", None)

    @property
    def is_self_conditioned(self) -> bool:
        """True if the input at masked positions includes the estimate of an earlier pass (`expected_embedding`)."""
        return getattr(self.backbone, "is_self_conditioned", False)

    def zero_estimate(self, xt: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """Returns the all-zero estimate, for rows without an earlier prediction."""
        weight = self.backbone.embedding.weight
        return weight.new_zeros(*xt.shape, weight.shape[1])

    @_in_compute_dtype
    def expected_embedding(
        self, hidden: Float[Tensor, "M D"], forbidden: Int[Tensor, "F"] | None = None
    ) -> Float[Tensor, "M D"]:
        """Computes `sum_v p(v) E[v]` over the tokens that these hidden states predict; no gradient."""
        embedding = self.backbone.embedding.weight
        found = expected_value(hidden, self.backbone.head_weight, embedding, mask_id=self.mask_id, forbidden=forbidden)
        return found.to(embedding.dtype)

    def _self_condition(self, batch: MaskedBatch) -> Float[Tensor, "B L D"] | None:
        """Returns the estimate that the batch's pass starts from; None without self-conditioning.

        With the zero estimate the weights of self-conditioning get a gradient of 0 all the same.
        """
        if not self.is_self_conditioned:
            return None
        if batch.estimate is not None:
            return batch.estimate
        zero = self.zero_estimate(batch.xt)
        if not self._makes_first_pass(batch):
            return zero
        with torch.no_grad():
            hidden = self._hidden(batch, zero)
        return self._estimate_from(batch, hidden)

    def _makes_first_pass(self, batch: MaskedBatch) -> bool:
        if not self.is_self_conditioned or batch.estimate is not None:
            return False
        is_first = batch.is_carried and batch.step is not None
        return not is_first and has_first_pass(self.seed, batch.step)

    def count_passes(self, batch: MaskedBatch) -> float:
        """Counts the forward passes that `forward` makes of `batch`: positions that layers read, by B L and layers.

        A block model reads `[xt ; x0]` but for the last clean block, (2 L - S) / L passes. The first pass for an
        estimate counts like the other, though it has no gradient, and a layer in a loop each time that it runs.
        """
        length = batch.xt.shape[1]
        clean = 0 if self.block_size is None else num_clean(length, self.block_size)
        times = draw(self.backbone, self.seed, batch.step)
        return (1 + self._makes_first_pass(batch)) * (1 + clean / length) * depth(self.backbone, times)

    @torch.no_grad()
    def _estimate_from(self, batch: MaskedBatch, hidden: Float[Tensor, "M D"]) -> Float[Tensor, "B L D"]:
        return scatter_to_canvas(self.expected_embedding(hidden.detach()), batch.scored, batch.xt == self.mask_id)

    def _aligned(self, xt: Int[Tensor, "B L"], at: Int[Tensor, "M"]) -> Int[Tensor, "M"]:
        """Returns the flat positions that the predictions of `at` are read from."""
        if self.alignment == "same":
            return at
        has_before = (at % xt.shape[1] != 0).all()
        if has_before.is_cuda:
            torch._assert_async(has_before, NOTHING_BEFORE)  # nobody waits for the device
        elif not has_before:
            raise UserError(NOTHING_BEFORE)
        return at - 1

    def _hidden(self, batch: MaskedBatch, estimate: Float[Tensor, "B L D"] | None) -> Float[Tensor, "M D"]:
        is_compiled = self._compiled is not None and self.training
        at = self._aligned(batch.xt, batch.at)
        if self.block_size is None:
            run, canvases = self.backbone, [batch.xt]
        else:
            run, canvases = self.backbone.two_streams, [batch.xt, batch.x0]
            at = self._in_two_streams(batch, at)
        if is_compiled:
            run = self._compiled
            torch._dynamo.mark_dynamic(at, 0)  # how many are scored changes with every step
        return run(*canvases, at, *_if_given(estimate))

    def _in_two_streams(self, batch: MaskedBatch, at: Int[Tensor, "M"]) -> Int[Tensor, "M"]:
        """Returns the flat positions of `at` (the aligned `batch.at`) in `[xt ; x0]`: earlier blocks are read clean."""
        assert self.block_size is not None, "a block model"
        length = batch.xt.shape[1]
        place = at % length
        is_earlier = place // self.block_size < batch.at % length // self.block_size
        width = length + num_clean(length, self.block_size)
        return at // length * width + torch.where(is_earlier, place + length, place)

    @property
    def _is_large(self) -> bool:
        return len(self.backbone.head_weight) >= LARGE_VOCABULARY

    def predict(self, xt: Int[Tensor, "B L"], at: Int[Tensor, "M"], query: Query | None = None) -> Prediction:
        """Predicts values and confidences at the flat positions `at` of `xt`; default query: the likeliest values."""
        return self.predict_from_hidden(self.hidden(xt, at), query or Query())

    @_in_compute_dtype
    def hidden(
        self, xt: Int[Tensor, "B L"], at: Int[Tensor, "M"], estimate: Float[Tensor, "B L D"] | None = None
    ) -> Float[Tensor, "M D"]:
        """Computes the hidden states at the flat positions `at` of `xt`, for `predict_from_hidden`.

        `estimate`, for self-conditioned models: `expected_embedding` at masked positions, 0 elsewhere.
        """
        return (self._compiled_prediction or self.backbone)(xt, self._aligned(xt, at), *_if_given(estimate))

    @_in_compute_dtype
    def hidden_within(
        self,
        xt: Int[Tensor, "b L"],
        at: Int[Tensor, "M"],
        *,
        start: Int[Tensor, "b"],
        width: int,
        cache: KeyValueCache,
        rows: Int[Tensor, "b"] | None = None,
        estimate: Float[Tensor, "b L D"] | None = None,
    ) -> Float[Tensor, "M D"]:
        """Computes `hidden` by reading only the places `start .. start + width` of each canvas.

        Elsewhere they see what is in the cache; what it holds for these places is replaced.

        Args:
            xt: the canvases.
            at: flat positions, all inside these windows.
            start: where each canvas's window begins.
            width: the width of all windows.
            cache: keys and values of the canvases. With `alignment=next` the place before `start` is read too; a causal
                model does not read the window's last place, which predicts nothing inside it.
            rows: the cache's rows of these canvases; default: all.
            estimate: as in `hidden`.
        """
        shift = int(self.alignment == "next")
        offset = torch.arange(-shift, width - int(self.is_causal), device=xt.device)
        place = (start.unsqueeze(1) + offset).clamp(min=0)  # nothing is before place 0: it is read twice, as the same
        if estimate is not None:
            estimate = estimate.gather(1, place.unsqueeze(-1).expand(-1, -1, estimate.shape[-1]))
        hidden = self.backbone.extend(xt.gather(1, place), place, cache, rows, *_if_given(estimate))
        aligned = self._aligned(xt, at)
        row = at // xt.shape[1]
        index = row * len(offset) + aligned % xt.shape[1] - (start[row] - shift)
        return hidden.flatten(0, 1).index_select(0, index)

    @_in_compute_dtype
    def predict_from_hidden(self, hidden: Float[Tensor, "M D"], query: Query) -> Prediction:
        """Answers `query` from the hidden states of the positions. Logits are linear in them."""
        is_compiled = self._compiled_prediction is not None
        if not self._is_large:
            return Prediction.from_logits(self._head(hidden), query, mask_id=self.mask_id)
        return prediction(hidden, self.backbone.head_weight, query, mask_id=self.mask_id, is_compiled=is_compiled)

    @_in_compute_dtype
    def logits(
        self, xt: Int[Tensor, "B L"], at: Int[Tensor, "M"], estimate: Float[Tensor, "B L D"] | None = None
    ) -> Float[Tensor, "M V"]:
        """Computes logits, in fp32 at least, at the flat positions `at` of `xt`; -inf for the mask token."""
        return self._head(self.backbone(xt, self._aligned(xt, at), *_if_given(estimate)))

    def _head(self, hidden: Float[Tensor, "M D"]) -> Float[Tensor, "M V"]:
        weight = self.backbone.head_weight
        if not weight.requires_grad:  # of a frozen base, held in its own format (`models/lora.py`)
            weight = weight.to(hidden.dtype)
        return forbid_tokens(at_least_fp32(F.linear(hidden, weight)), self.mask_id)


def _if_given(estimate: Float[Tensor, "B L D"] | None) -> list[Float[Tensor, "B L D"]]:
    """Returns the estimate as an optional argument: backbones without self-conditioning need not take it."""
    return [] if estimate is None else [estimate]


def _compile_block(block: nn.Module) -> None:
    plain, compiled = block.forward, torch.compile(block.forward)

    def forward(*arguments: Any) -> Tensor:
        return (compiled if block.training else plain)(*arguments)

    block.forward = forward
