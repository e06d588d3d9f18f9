"""The likelihood of held-out examples: a bound under uniform masks, whatever the training was; exact if causal.

Dimensions: R examples, D draws (masks) per example, B rows of a batch, N blocks of a row, L positions.

Which examples a process evaluates together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmask import noise
from unmask.blocks import count_blocks
from unmask.masking.process import make_batch
from unmask.masking.time import UNIFORM, stratified
from unmask.masking.uniform import mask_blocks
from unmask.models.denoiser import Denoiser
from unmask.noise import Purpose
from unmask.peers import ALONE, Peers
from unmask.types import CleanBatch, MaskedBatch


def batches_of(count: int, share: slice, batch_size: int) -> Sequence[Tensor]:
    """The numbers of those of `count` examples that are in `share`, `batch_size` at a time; no batch is empty.

    (`split` makes one empty batch of nothing, which a process has where there are more of them than examples.)
    """
    own = torch.arange(count)[share]
    return own.split(batch_size) if len(own) else ()


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    stderr: float


@dataclass(frozen=True)
class RowLikelihoods:
    """Of each example, in fp64; of a process that evaluates some of them, 0 for the others."""

    nll: Float[Tensor, "R"]
    """Per maskable token, in nats."""
    length: Float[Tensor, "R"]
    """L_eff."""

    def over_corpus(self, peers: Peers = ALONE) -> Estimate:
        """The ratio estimator `sum(length x row) / sum(length)` and its standard error; `peers` have the other rows."""
        per_row, length = peers.sum(self.nll), self.length
        mean = (length * per_row).sum() / length.sum()
        residual = length * (per_row - mean)
        rows = len(per_row)
        variance = (residual**2).sum() * rows / max(1, rows - 1)
        return Estimate(mean.item(), (variance.sqrt() / length.sum()).item())


def nelbo(model: Denoiser, examples: CleanBatch, **options: Any) -> Estimate:
    """The bound of `row_nelbos`, which says what the options are, over a corpus."""
    return row_nelbos(model, examples, **options).over_corpus()


def nll(model: Denoiser, examples: CleanBatch, **options: Any) -> Estimate:
    """The NLL of `row_nlls`, which says what the options are, over a corpus."""
    return row_nlls(model, examples, **options).over_corpus()


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
    """Upper bound on the NLL per maskable token, in nats.

    For each example, n masked positions with n uniform on {1, .., L_eff}: the mean NLL over them is an unbiased
    estimate of the bound per maskable token (see `weights.per_masked`). Of a model with a `block_size`, each block is
    masked so, and an example's value is `sum(L_b x block mean) / L_eff`. Over a corpus:
    `sum(L_eff x example value) / sum(L_eff)`. n is stratified over examples (and blocks) and spread over an example's
    draws, and the masks depend on `seed` and the example's number alone, so that models are compared on the same ones.
    Only the examples of `share` are looked at.
    """
    total = torch.zeros(len(examples), dtype=torch.float64)
    for rows, batch in uniform_masks(model, examples, share=share, draws=draws, seed=seed, batch_size=batch_size):
        total[rows] += _weighted_nll(model, batch)
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
    """The masks under which `row_nelbos` looks at examples: their numbers, and a batch on the model's device."""
    device = next(model.parameters()).device
    number = torch.arange(len(examples))
    seed = noise.integer(seed, Purpose.EVALUATE)
    num_blocks = count_blocks(examples.x0.shape[1], getattr(model, "block_size", None), "model.block_size")
    u = stratified(UNIFORM, number, len(examples), seed, step=0, num_blocks=num_blocks)
    for draw in range(draws):
        for rows in batches_of(len(examples), share, batch_size):
            clean, t = examples.at(rows).to(device), ((u[rows] + draw) / draws).to(device)
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
    """The exact NLL of a causal model per maskable token, in nats: `sum(row NLL) / sum(L_eff)`, as `nelbo` counts.

    A row's NLL is that of its answer up to the first end token: what follows it is certain.
    """
    device = next(model.parameters()).device
    total = torch.zeros(len(examples), dtype=torch.float64)
    for rows in batches_of(len(examples), share, batch_size):
        clean = examples.at(rows).to(device)
        batch = make_batch(clean.x0, clean.x0, clean.answer_mask(eos_id), torch.ones(clean.x0.shape, device=device))
        total[rows] = _weighted_nll(model, batch)
    length = (~examples.prompt_mask).sum(dim=-1).double()
    return RowLikelihoods(total / length.clamp(min=1), length)


def _weighted_nll(model: Denoiser, batch: MaskedBatch) -> Float[Tensor, "B"]:
    """The weighted sum over each row's scored positions, on the CPU."""
    stats = model(batch)
    return batch.scatter(stats.nll.double() * batch.weight, 0.0).sum(dim=-1).cpu()
