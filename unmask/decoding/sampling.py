"""Draws values from a model's distribution.

Dimensions: M positions (m of them), C tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmask import noise
from unmask.decoding.config import DecodeConfig
from unmask.errors import require
from unmask.noise import Purpose
from unmask.types import Query


@dataclass(frozen=True)
class Sampling:
    """A way to choose values from the model's distribution. The order of reveals uses that distribution untruncated.

    Args:
        temperature: 0 takes the likeliest value; else values are drawn from softmax(logits / temperature), with Gumbel
            noise in fp64 keyed by (seed, prompt, step, position, token).
        top_k, top_p: truncation of the distribution, see `truncated`; None: none.
        forbidden: ids of tokens that have probability 0.
    """

    temperature: float = 0.0
    seed: int = 0
    top_k: int | None = None
    top_p: float | None = None
    forbidden: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "1 or more, or None")
        require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "a share above 0, or None")

    @staticmethod
    def from_config(config: DecodeConfig) -> "Sampling":
        """Reads the settings of a section `decode`."""
        return Sampling(
            temperature=config.temperature,
            seed=config.seed,
            top_k=config.top_k,
            top_p=config.top_p,
            forbidden=tuple(config.forbid),
        )

    def query(
        self,
        prompt: Int[Tensor, "M"],
        step: Int[Tensor, "M"],
        position: Int[Tensor, "M"],
        *,
        confidence: str = "prob",
        has_entropy: bool = False,
        given: Int[Tensor, "M"] | None = None,
    ) -> Query:
        """Builds the query for `position` in `step` of the rows that are numbered `prompt`."""
        return Query(
            confidence=confidence,
            perturb=self._perturb(prompt, step, position) if self.temperature else None,
            is_truncated=self._is_truncated,
            forbidden=torch.tensor(self.forbidden, device=prompt.device) if self.forbidden else None,
            has_entropy=has_entropy,
            given=given,
        )

    @property
    def _is_truncated(self) -> bool:
        return self.top_k is not None or self.top_p not in (None, 1)

    def _perturb(
        self, *keys: Int[Tensor, "M"]
    ) -> Callable[[Float[Tensor, "m C"], Int[Tensor, "m"], Int[Tensor, "C"]], Float[Tensor, "m C"]]:
        """Returns `Query.perturb`: its largest entry is a draw from softmax(logits / temperature), truncated."""

        def perturb(
            logits: Float[Tensor, "m C"], row: Int[Tensor, "m"], token: Int[Tensor, "C"]
        ) -> Float[Tensor, "m C"]:
            tempered = logits.double() / self.temperature
            if self._is_truncated:
                tempered = truncated(tempered, self.top_k, self.top_p)
            return tempered + noise.gumbel(self.seed, Purpose.VALUE, *(key[row].unsqueeze(1) for key in keys), token)

        return perturb


def truncated(logits: Float[Tensor, "m V"], top_k: int | None, top_p: float | None) -> Float[Tensor, "m V"]:
    """Keeps the k largest logits, and the fewest of softmax(logits) whose mass is at least p; the rest are -inf.

    With both, keeps what is in both sets. The lower one of equal tokens comes first.
    """
    ranked, token = logits.sort(dim=-1, descending=True, stable=True)
    is_kept = torch.ones_like(ranked, dtype=torch.bool)
    if top_p is not None:
        is_kept[:, 1:] = ranked.softmax(dim=-1).cumsum(dim=-1)[:, :-1] < top_p
    if top_k is not None:
        is_kept[:, top_k:] = False
    return logits.masked_fill(~torch.empty_like(is_kept).scatter_(-1, token, is_kept), -torch.inf)
