"""Loss weights: the factor of a masked token's NLL, in fp64. The loss is the weighted sum over the number of rows.

`WEIGHTS` holds the weights of masks that are drawn at a time t (`uniform.py`), by name.
Dimensions: B rows, N blocks of a row (1 in plain diffusion), S positions of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.noise import wide


@dataclass(frozen=True, kw_only=True)
class MaskSample:
    """Masks, with the times and probabilities that they were drawn with."""

    is_masked: Bool[Tensor, "B N S"]
    eligible: Bool[Tensor, "B N S"]
    t: Float[Tensor, "B N"]
    """Masked share: n_b / L_b of exact counts; the expected share where positions are masked independently."""
    ratio: Float[Tensor, "B N"]
    """Likelihood ratio to uniform times: `L_b P(n_b)` of exact counts, q(t) of independent masks."""
    mean_t: float
    """E[t]."""


def per_masked(is_masked: Bool[Tensor, "B N S"], eligible: Bool[Tensor, "B N S"]) -> Float[Tensor, "B N"]:
    """Returns `L_b / (n_b L_eff)` for a block with n_b of its L_b maskable positions masked.

    Each block's mean NLL of masked tokens counts by its share of the row. With one block it is 1/n: the mean NLL of the
    row's masked tokens.

    With n_b uniform on {1, .., L_b}, the expected loss is the NELBO per maskable token in nats (Ou et al. 2024,
    2406.03736, k-DCE; Kim et al. 2025, 2502.06768, proposition 2.1; of blocks: Arriola et al. 2025, 2503.09573).
    """
    num_maskable = eligible.sum(dim=-1)
    # The quotient of whole numbers, rounded once: with one block, 1/n to the last bit.
    return wide(num_maskable) / (is_masked.sum(dim=-1) * _length(num_maskable)).clamp(min=1)


def capped(is_masked: Bool[Tensor, "B N S"], eligible: Bool[Tensor, "B N S"], cap: float) -> Float[Tensor, "B N"]:
    """Returns `min(1/t, cap) / L_eff`, with t = n_b / L_b: as `per_masked`, but never more than `cap / L_eff`.

    The cap bounds the weight of blocks that are almost visible, and biases: the loss is no NELBO (PUMBA, appendix B).
    """
    return per_masked(is_masked, eligible).minimum(cap / wide(_length(eligible.sum(dim=-1)).clamp(min=1)))


def elbo(sample: MaskSample) -> Float[Tensor, "B N"]:
    """Returns `1 / (t L_eff)` (Sahoo et al. 2024, 2406.07524; Shi et al. 2024, 2406.04329).

    Under uniform t the expected loss is the NELBO per maskable token. With exact counts it is `per_masked`.
    """
    return 1 / (sample.t * _length(sample.eligible.sum(dim=-1)).clamp(min=1))


def importance(sample: MaskSample, cap: float | None = None) -> Float[Tensor, "B N"]:
    """Returns `min(1 / ratio, cap) / (t L_eff)`: without the cap, the NELBO whatever the density, wherever it has mass.

    A cap bounds the weight of what is rarely drawn, and biases: the loss is then no NELBO.
    """
    factor = 1 / sample.ratio
    return elbo(sample) * (factor if cap is None else factor.clamp(max=cap))


def flat(sample: MaskSample) -> Float[Tensor, "B N"]:
    """Returns `1 / (E[t] L_eff)`: all masked tokens weigh the same (BD3-LM's clipped times drop 1/t).

    A row weighs 1 on average of independent masks. Exact counts are rounded up in each of N blocks, by half a position
    on average, so that a row weighs about `1 + N / (2 L_eff E[t])`.
    """
    length = _length(sample.eligible.sum(dim=-1)).clamp(min=1).double()
    return (1 / (sample.mean_t * length)).expand(sample.t.shape)


WEIGHTS: dict[str, Callable[[MaskSample], Float[Tensor, "B N"]]] = {
    "per_masked": lambda sample: per_masked(sample.is_masked, sample.eligible),
    "elbo": elbo,
    "importance": importance,
    "flat": flat,
}


def _length(num_maskable: Int[Tensor, "B N"]) -> Int[Tensor, "B 1"]:
    """Returns L_eff of the whole row."""
    return num_maskable.sum(dim=-1, keepdim=True)
