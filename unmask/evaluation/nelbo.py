"""The likelihood of held-out examples: a bound under uniform masks, whatever the training was; exact if causal.

Dimensions: R examples, D draws (masks) per example, B rows of a batch, L positions.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmask import noise
from unmask.masking import weights
from unmask.masking.causal import is_answer
from unmask.masking.process import score, score_masked
from unmask.masking.random import mask_exactly
from unmask.masking.time import UniformTime, masked_count, stratified
from unmask.models.denoiser import Denoiser
from unmask.models.precision import autocast
from unmask.noise import Purpose
from unmask.types import CleanBatch


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    stderr: float


@torch.no_grad()
def nelbo(
    model: Denoiser,
    examples: CleanBatch,
    *,
    draws: int = 2,
    seed: int = 0,
    batch_size: int = 256,
    dtype: str = "float32",
) -> Estimate:
    """Upper bound on the NLL per maskable token, in nats.

    For each example, n masked positions with n uniform on {1, .., L_eff}: the mean NLL over them is an unbiased
    estimate of the bound per maskable token (see `weights.per_masked`). Over a corpus:
    `sum(L_eff x example mean) / sum(L_eff)`. n is stratified over examples and spread over an example's draws, and the
    masks depend on `seed` and the example's number alone, so that models are compared on the same ones.
    """
    device = next(model.parameters()).device
    number = torch.arange(len(examples))
    seed = noise.integer(seed, Purpose.EVALUATE)
    u = stratified(UniformTime(), number, len(examples), seed, step=0)
    total = torch.zeros(len(examples), dtype=torch.float64)
    for draw in range(draws):
        for start in range(0, len(examples), batch_size):
            rows = slice(start, start + batch_size)
            t = (u[rows] + draw) / draws
            total[rows] += _mean_nll(model, examples[rows].to(device), t, number[rows], seed, draw, dtype).cpu()
    return _corpus_mean(total / draws, (~examples.prompt_mask).sum(dim=-1).double())


@torch.no_grad()
def nll(
    model: Denoiser,
    examples: CleanBatch,
    *,
    eos_id: int | None,
    batch_size: int = 256,
    dtype: str = "float32",
) -> Estimate:
    """The exact NLL of a causal model per maskable token, in nats: `sum(row NLL) / sum(L_eff)`, as `nelbo` counts.

    A row's NLL is that of its answer up to the first end token: what follows it is certain.
    """
    device = next(model.parameters()).device
    total = torch.zeros(len(examples), dtype=torch.float64)
    for start in range(0, len(examples), batch_size):
        rows = slice(start, start + batch_size)
        clean = examples[rows].to(device)
        batch = score(clean.x0, clean.x0, is_answer(clean, eos_id), torch.ones(clean.x0.shape, device=device))
        with autocast(dtype, device):
            stats = model(batch)
        total[rows] = batch.scatter(stats.nll.double() * batch.weight, 0.0).sum(dim=-1).cpu()
    length = (~examples.prompt_mask).sum(dim=-1).double()
    return _corpus_mean(total / length, length)


def _mean_nll(
    model: Denoiser,
    clean: CleanBatch,
    t: Float[Tensor, "B"],
    number: Int[Tensor, "B"],
    seed: int,
    draw: int,
    dtype: str,
) -> Float[Tensor, "B"]:
    """Mean NLL over the masked positions of each row, one mask per row."""
    eligible = ~clean.prompt_mask
    count = masked_count(t.to(eligible.device), eligible.sum(dim=-1))
    is_masked = mask_exactly(eligible, count, number.to(eligible.device), seed, Purpose.MASK, draw)
    xt = torch.where(is_masked, model.mask_id, clean.x0)
    batch = score_masked(clean.x0, xt, model.mask_id, weights.per_masked(is_masked))
    with autocast(dtype, eligible.device):
        stats = model(batch)
    return batch.scatter(stats.nll.double() * batch.weight, 0.0).sum(dim=-1)


def _corpus_mean(per_row: Float[Tensor, "R"], length: Float[Tensor, "R"]) -> Estimate:
    """The ratio estimator `sum(length x row) / sum(length)` and its standard error."""
    mean = (length * per_row).sum() / length.sum()
    residual = length * (per_row - mean)
    rows = len(per_row)
    variance = (residual**2).sum() * rows / max(1, rows - 1)
    return Estimate(mean.item(), (variance.sqrt() / length.sum()).item())
