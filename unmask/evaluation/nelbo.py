"""The likelihood of held-out examples: a bound under uniform masks, whatever the training; exact for a causal model.

Dimensions: R examples, D draws (masks) per example, B rows of a batch, N blocks of a row, L positions.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmask import noise
from unmask.blocks import count_blocks
from unmask.errors import UserError, check_finite
from unmask.masking.process import make_batch
from unmask.masking.time import UNIFORM, stratified
from unmask.masking.uniform import mask_blocks
from unmask.models.denoiser import Denoiser
from unmask.noise import Purpose
from unmask.peers import ALONE, Peers
from unmask.tasks.task import Extent, Task
from unmask.types import CleanBatch, MaskedBatch, to_device


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    stderr: float | None
    """None if it is unknown: of a single example."""

    def text(self, form: str) -> str:
        """Formats the estimate, each number by `form`."""
        return f"{self.value:{form}}" + ("" if self.stderr is None else f" ± {self.stderr:{form}}")


@dataclass(frozen=True)
class RowLikelihoods:
    """The likelihood of each example, in fp64; 0 for the examples of other processes."""

    nll: Float[Tensor, "R"]
    """Nats per maskable token."""
    length: Float[Tensor, "R"]
    """L_eff, the number of maskable tokens."""

    def over_corpus(self, peers: Peers = ALONE) -> Estimate:
        """Returns the ratio estimate `sum(length x row) / sum(length)`; `peers` have the other rows. Collective.

        Raises:
            UserError: the examples have no maskable token.
        """
        per_row, length = peers.sum(self.nll), self.length
        if not length.sum():
            raise UserError(
                "there is nothing to predict: all tokens of these examples are given; give some with answers"
            )
        mean = (length * per_row).sum() / length.sum()
        residual = length * (per_row - mean)
        rows = len(per_row)
        if int((length > 0).sum()) < 2:
            return Estimate(mean.item(), None)
        variance = (residual**2).sum() * rows / (rows - 1)
        return Estimate(mean.item(), (variance.sqrt() / length.sum()).item())


@dataclass(frozen=True)
class TextLikelihood:
    """A likelihood in the units of running text. Bounds if the NELBO is one; exact for a causal model."""

    ppl: float
    """exp of the nats per token of text. A document's end token counts, padding does not."""
    bits_per_byte: float
    """Bits per byte of the text, whatever the tokenizer."""
    rows: str
    """The way the text was cut (`Extent.rows`)."""

    @staticmethod
    def of(nelbo: float, num_maskable: int, extent: Extent) -> "TextLikelihood":
        """Converts nats per maskable token; `nelbo x num_maskable` is the cost of all the text, padding included."""
        nats = nelbo * num_maskable
        return TextLikelihood(
            ppl=math.exp(min(700.0, nats / extent.tokens)),  # no float holds the perplexity of a model that diverged
            bits_per_byte=nats / (math.log(2) * max(1, extent.bytes)),
            rows=extent.rows,
        )


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of a set of examples."""

    estimate: Estimate
    """Nats per maskable token."""
    is_exact: bool
    """True for a causal model, whose NLL is known; else the estimate is of a bound, the NELBO."""
    text: TextLikelihood | None = None
    """The same in the units of running text; None for other tasks."""
    rows: RowLikelihoods | None = field(default=None, repr=False, compare=False)
    """The likelihoods of this process's examples."""

    @property
    def name(self) -> str:
        return "NLL" if self.is_exact else "NELBO"

    def values(self) -> dict[str, float | None]:
        """Returns the NELBO or NLL (both called `nelbo`), its standard error, and the units of text, by name."""
        own: dict[str, float | None] = {"nelbo": self.estimate.value, "nelbo_stderr": self.estimate.stderr}
        return own | ({} if self.text is None else {"ppl": self.text.ppl, "bits_per_byte": self.text.bits_per_byte})


def measure_likelihood(
    model: Denoiser, task: Task, examples: CleanBatch, *, draws: int, share: slice = slice(None)
) -> RowLikelihoods:
    """Measures the exact NLL of a causal model, else the NELBO, of examples whose answers are known as tokens."""
    if model.is_causal:
        return row_nlls(model, examples, eos_id=task.tokens.eos_id, share=share)
    return row_nelbos(model, examples, draws=draws, share=share)


def summarise(
    rows: RowLikelihoods, model: Denoiser, task: Task, examples: CleanBatch, peers: Peers = ALONE
) -> Likelihood:
    """Summarises the likelihoods of all rows, of which `peers` have some. Collective."""
    estimate, extent = rows.over_corpus(peers), getattr(task, "extent", None)
    num_maskable = int((~examples.prompt_mask).sum())
    text = None if extent is None else TextLikelihood.of(estimate.value, num_maskable, extent(examples))
    return Likelihood(estimate, model.is_causal, text, rows)


@torch.no_grad()
def row_nelbos(
    model: Denoiser,
    examples: CleanBatch,
    *,
    share: slice = slice(None),
    draws: int = 2,
    seed: int = 0,
    batch_size: int = 256,
) -> RowLikelihoods:
    """Estimates an upper bound on the NLL per maskable token, in nats, for the examples of `share`.

    Each example gets n masked positions with n uniform on {1, .., L_eff}: the mean NLL over them is an unbiased
    estimate of the bound per maskable token (see `weights.per_masked`). For a model with a `block_size` each block is
    masked so, and an example's value is `sum(L_b x block mean) / L_eff`. Over a corpus:
    `sum(L_eff x example value) / sum(L_eff)`. n is stratified over examples (and blocks) and spread over an example's
    draws. The masks depend on `seed` and the example's number alone, so models are compared on the same masks.
    """
    total = torch.zeros(len(examples), dtype=torch.float64)
    for rows, batch in uniform_masks(model, examples, share=share, draws=draws, seed=seed, batch_size=batch_size):
        total[rows] += _weighted_nll(model, batch, rows)
    return RowLikelihoods(total / draws, (~examples.prompt_mask).sum(dim=-1).double())


def uniform_masks(
    model: Denoiser,
    examples: CleanBatch,
    *,
    share: slice = slice(None),
    draws: int,
    seed: int,
    batch_size: int,
) -> Iterator[tuple[Int[Tensor, "B"], MaskedBatch]]:
    """Yields the masked batches of `row_nelbos`, on the model's device, with the numbers of their examples."""
    device = next(model.parameters()).device
    number = torch.arange(len(examples))
    seed = noise.integer(seed, Purpose.EVALUATE)
    num_blocks = count_blocks(examples.x0.shape[1], getattr(model, "block_size", None), "model.block_size")
    u = stratified(UNIFORM, number, len(examples), seed, step=0, num_blocks=num_blocks)
    for draw in range(draws):
        for rows in batches_of(len(examples), share, batch_size):
            clean, t = examples.at(rows).to(device), to_device((u[rows] + draw) / draws, device)
            yield rows, mask_blocks(clean, t, rows.to(device), model.mask_id, seed, draw)


@torch.no_grad()
def row_nlls(
    model: Denoiser,
    examples: CleanBatch,
    *,
    eos_id: int | None,
    share: slice = slice(None),
    batch_size: int = 256,
) -> RowLikelihoods:
    """Computes the exact NLL of a causal model per maskable token, in nats, counted as `row_nelbos` counts.

    A row's NLL is that of its answer up to the first end token: what follows is certain to be padding.
    """
    device = next(model.parameters()).device
    total = torch.zeros(len(examples), dtype=torch.float64)
    for rows in batches_of(len(examples), share, batch_size):
        clean = examples.at(rows).to(device)
        batch = make_batch(clean.x0, clean.x0, clean.answer_mask(eos_id), torch.ones(clean.x0.shape, device=device))
        total[rows] = _weighted_nll(model, batch, rows)
    length = (~examples.prompt_mask).sum(dim=-1).double()
    return RowLikelihoods(total / length.clamp(min=1), length)


def _weighted_nll(model: Denoiser, batch: MaskedBatch, rows: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Sums the weighted NLL of each row's scored positions, on the CPU; `rows` number the examples."""
    stats = model(batch)
    found = batch.scatter(noise.wide(stats.nll) * batch.weight, 0.0).sum(dim=-1).cpu().double()
    check_finite(found.tolist(), "the model", "example", rows.tolist())
    return found


def batches_of(count: int, share: slice, batch_size: int) -> Sequence[Tensor]:
    """Splits the numbers of the examples in `share` into batches; none is empty (`split` makes one of nothing)."""
    own = torch.arange(count)[share]
    return own.split(batch_size) if len(own) else ()
