"""Loss weights: the factor of a masked token's NLL, in fp64. The loss is the weighted sum over the number of rows.

Dimensions: B rows, L positions.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor


def per_masked(is_masked: Bool[Tensor, "B L"]) -> Float[Tensor, "B"]:
    """`1/n` for a row with n masked positions: the mean NLL of its masked tokens.

    With n uniform on {1, .., L_eff}, the expected loss is the NELBO per maskable token in nats (Ou et al. 2024,
    2406.03736, k-DCE; Kim et al. 2025, 2502.06768, proposition 2.1).
    """
    return 1.0 / is_masked.sum(dim=-1).clamp(min=1).double()


def capped(is_masked: Bool[Tensor, "B L"], num_maskable: Int[Tensor, "B"], cap: float) -> Float[Tensor, "B"]:
    """`min(1/t, cap) / L_eff`, with t = n / L_eff: `1/n`, but never more than `cap / L_eff`.

    The cap bounds the weight of rows that are almost visible, and biases: the loss is no NELBO (PUMBA, appendix B).
    """
    return per_masked(is_masked).minimum(cap / num_maskable.clamp(min=1).double())
