"""The regression estimator of a sum over drawn masks (Cassel, Sarndal and Wretman 1976), with a model of positions.

Most of the noise of a plain mean is which tokens the masks hold, as small masks count each of theirs many times, and
some tokens are hard whatever else is masked. So each position's NLL is predicted from the other draws, and only what
the prediction misses is weighted. The mean of the prediction over all masks is known, so this adds no bias.

Dimensions: D draws, L positions, S = 4 states of a position's neighbours.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

_WIDTH = 0.3
"""Distance of two draws, as a share of D, at which one counts 1 / e in predicting the other: the NLL depends on n."""
_PRIOR = 2.0
"""Draws for which a more general mean counts in the prediction of a position, and of one in a state. With fewer, more
is gained where positions are hard on their own, and more lost where they are not."""


def estimate_draws(
    nll: Float[Tensor, "D L"], is_masked: Bool[Tensor, "D L"], block: Int[Tensor, "L"]
) -> Float[Tensor, "D"]:
    """Estimates the sum over blocks of E[L_b / n_b x NLL] from each draw; the mean over draws is the estimate.

    With a the prediction of an NLL, which depends on the position and on whether its neighbours are masked too, it is

        sum_i E[a_i | n_b]  +  sum_{i masked} L_b / n_b (NLL_i - a_i).

    A mask of n of L_b positions is random and independent of all others, which a is made from, so the second sum of a
    has the mean of the first, and the estimate is unbiased.

    Args:
        nll: of each masked position. Draws are in the order of their masked share.
        is_masked: masks, drawn independently of each other; of each block one position at least.
        block: the block of each position; a block's are side by side.
    """
    held = is_masked.to(nll.dtype)
    own = block - block[0]
    size = own.bincount()[own].to(nll.dtype)
    n = held.new_zeros(len(held), int(own[-1]) + 1).index_add(1, own, held)[:, own]
    near, chance = _neighbours(is_masked, block, n, size)
    expected = _predict(nll, near * held.unsqueeze(-1))
    missed = held * nll - (near * held.unsqueeze(-1) * expected).sum(dim=-1)
    return (chance * expected).sum(dim=(1, 2)) + (size / n * missed).sum(dim=1)


def _neighbours(
    is_masked: Bool[Tensor, "D L"], block: Int[Tensor, "L"], n: Float[Tensor, "D L"], size: Float[Tensor, "L"]
) -> tuple[Float[Tensor, "D L S"], Float[Tensor, "D L S"]]:
    """Returns the state of each position's neighbours (neither masked, the right one, the left one, both), one-hot, and
    the chance of each state where the position is one of n masked. Those in other blocks count as not masked."""
    inside = F.pad(block[1:] == block[:-1], (1, 1))
    has_left, has_right = inside[:-1], inside[1:]
    left = F.pad(is_masked, (1, 0))[:, :-1] & has_left
    right = F.pad(is_masked, (0, 1))[:, 1:] & has_right
    near = F.one_hot(2 * left.long() + right.long(), 4).to(n.dtype)
    one = (n - 1) / (size - 1).clamp(min=1)
    both = has_left * has_right * one * (n - 2) / (size - 2).clamp(min=1)
    of_left, of_right = has_left * one, has_right * one
    return near, torch.stack([1 - of_left - of_right + both, of_right - both, of_left - both, both], dim=-1)


def _predict(nll: Float[Tensor, "D L"], seen: Float[Tensor, "D L S"]) -> Float[Tensor, "D L S"]:
    """Predicts the NLL of each position in each state from the other draws that saw it: a mean, drawn towards that of
    the state plus what the position adds to it."""
    draws = torch.arange(len(nll), dtype=nll.dtype, device=nll.device)
    # A draw has no part in its own prediction, or that would depend on its mask.
    near = torch.exp(-(draws[:, None] - draws).abs() / (_WIDTH * len(draws))).fill_diagonal_(0)
    total, count = (torch.einsum("de,els->dls", near, each) for each in (seen * nll.unsqueeze(-1), seen))
    mean = total.sum(dim=(1, 2), keepdim=True) / count.sum(dim=(1, 2), keepdim=True).clamp(min=1e-9)
    of_state = (total.sum(dim=1, keepdim=True) + _PRIOR * mean) / (count.sum(dim=1, keepdim=True) + _PRIOR)
    above = (total - count * of_state).sum(dim=2, keepdim=True) / (count.sum(dim=2, keepdim=True) + _PRIOR)
    return (total + _PRIOR * (of_state + above)) / (count + _PRIOR)


def stratified_stderr(estimates: Float[Tensor, "D"]) -> float | None:
    """Returns the standard error of the mean of one draw from each of D strata; None for a single one.

    Neighbouring strata are much alike, so the squared difference of two estimates has the sum of both variances as its
    mean (collapsed strata, Cochran 1977). Of an odd number, the last three make a group. That estimates by regression
    vary together is left out: up to a quarter too small was seen, of 32 draws of 6 positions.
    """
    draws = len(estimates)
    if draws < 2:
        return None
    groups = [*estimates.split(2)] if draws % 2 == 0 else [*estimates[:-3].split(2), estimates[-3:]]
    variance = sum(len(group) * group.var().item() for group in groups if len(group))
    return float(variance) ** 0.5 / draws
