"""Values drawn from a model's distribution.

Dimensions: M positions, C tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from unmask import noise
from unmask.noise import Purpose
from unmask.types import Ask


@dataclass(frozen=True)
class Sampling:
    """How values are chosen from the model's distribution.

    Args:
        temperature: 0 takes the likeliest value; else values are drawn from softmax(logits / temperature), with Gumbel
            noise in fp64 keyed by (seed, prompt, step, position, token).
    """

    temperature: float = 0.0
    seed: int = 0

    def ask(
        self,
        prompt: Int[Tensor, "M"],
        step: Int[Tensor, "M"],
        position: Int[Tensor, "M"],
        *,
        confidence: str = "prob",
        has_entropy: bool = False,
        given: Int[Tensor, "M"] | None = None,
    ) -> Ask:
        """What to ask of the model at `position` in `step` of the rows that are numbered `prompt`."""
        perturb = value_noise(self.temperature, self.seed, prompt, step, position)
        return Ask(confidence=confidence, perturb=perturb, has_entropy=has_entropy, given=given)


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
