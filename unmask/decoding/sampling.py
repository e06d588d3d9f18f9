"""Values drawn from a model's distribution.

Dimensions: M positions, C tokens.
"""

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor

from unmask import noise
from unmask.noise import Purpose


def value_noise(
    temperature: float, seed: int, prompt: Int[Tensor, "M"], step: Int[Tensor, "M"], position: Int[Tensor, "M"]
) -> Callable[[Float[Tensor, "M C"], Int[Tensor, "C"]], Float[Tensor, "M C"]] | None:
    """`Ask.perturb`: Gumbel noise in fp64 keyed by row, step, position and token; None at temperature 0.

    The token of the largest sum is a draw from softmax(logits / temperature).
    """
    if temperature == 0:
        return None
    keys = [key.unsqueeze(1) for key in (prompt, step, position)]

    def perturb(logits: Float[Tensor, "M C"], token: Int[Tensor, "C"]) -> Float[Tensor, "M C"]:
        return logits.double() / temperature + noise.gumbel(seed, Purpose.VALUE, *keys, token)

    return perturb
