"""Draws values from a model's distribution.

Dimensions: M positions (m of them), C tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask import noise
from unmask.decoding.config import DecodeConfig
from unmask.decoding.truncation import TokenBins, truncated
from unmask.errors import require
from unmask.noise import Purpose
from unmask.types import Query


@dataclass(frozen=True)
class Sampling:
    """A way to choose values from the model's distribution. The order of reveals uses that distribution untruncated.

    Args:
        temperature: 0 takes the likeliest value; else values are drawn from softmax(logits / temperature), with Gumbel
            noise in fp64 keyed by (seed, the row's key, step, position, token).
        top_k, top_p: truncation of the distribution, see `truncation.truncated`; None: none.
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
        key: Int[Tensor, "M"],
        step: Int[Tensor, "M"],
        position: Int[Tensor, "M"],
        *,
        confidence: str = "prob",
        has_entropy: bool = False,
        given: Int[Tensor, "M"] | None = None,
    ) -> Query:
        """Builds the query for `position` in `step` of the rows with these keys for the noise."""
        is_truncated = self.top_k is not None or self.top_p not in (None, 1)
        return Query(
            confidence=confidence,
            perturb=self._perturb(key, step, position) if self.temperature and not is_truncated else None,
            draw=self._draw(key, step, position) if self.temperature and is_truncated else None,
            forbidden=torch.tensor(self.forbidden, device=key.device) if self.forbidden else None,
            has_entropy=has_entropy,
            given=given,
        )

    def _perturb(
        self, *keys: Int[Tensor, "M"]
    ) -> Callable[[Float[Tensor, "m C"], Int[Tensor, "m"], Int[Tensor, "C"]], Float[Tensor, "m C"]]:
        """Returns `Query.perturb`: its largest entry is a draw from softmax(logits / temperature)."""

        def perturb(
            logits: Float[Tensor, "m C"], row: Int[Tensor, "m"], token: Int[Tensor, "C"]
        ) -> Float[Tensor, "m C"]:
            return self._scores(logits, *(key[row].unsqueeze(1) for key in keys), token)

        return perturb

    def _draw(self, *keys: Int[Tensor, "M"]) -> Callable[[Float[Tensor, "m V"], Int[Tensor, "m"]], Int[Tensor, "m"]]:
        """Returns `Query.draw`: of the tokens that truncation keeps, the one that `perturb` gives the largest score."""

        def draw(logits: Float[Tensor, "m V"], row: Int[Tensor, "m"]) -> Int[Tensor, "m"]:
            own = [key[row] for key in keys]
            tempered = _below_largest(logits) / max(self.temperature, _COLDEST)
            p = tempered.float().softmax(dim=-1)
            if logits.shape[1] <= _FEW:  # to sort them costs less than to avoid it
                return self._best(logits, p, self._is_kept(logits), *own)
            bins = TokenBins.of(tempered, p, self.top_k, self.top_p)
            best = self._best(logits, p, bins.is_open(), *own)
            for i in (~bins.is_kept(best)).nonzero():
                best[i] = self._best(logits[i], p[i], self._is_kept(logits[i]), *(key[i] for key in own))
            return best

        return draw

    def _is_kept(self, logits: Float[Tensor, "m V"]) -> Bool[Tensor, "m V"]:
        return truncated(_below_largest(noise.wide(logits)) / self.temperature, self.top_k, self.top_p) > -torch.inf

    def _best(
        self, logits: Float[Tensor, "m V"], p: Float[Tensor, "m V"], is_open: Bool[Tensor, "m V"], *keys: Tensor
    ) -> Int[Tensor, "m"]:
        """Finds the token of the largest score in each row, where `is_open`; `p` is softmax(logits / temperature)."""
        i, v = self._can_win(p, is_open, *keys).nonzero().unbind(-1)
        score = self._scores(logits[i, v], *(key[i] for key in keys), v)
        best = score.new_full((len(logits),), -torch.inf).scatter_reduce_(0, i, score, "amax")
        is_best = score == best[i]
        return i.new_zeros(len(logits)).scatter_reduce_(0, i[is_best], v[is_best], "amin", include_self=False)

    def _can_win(
        self, p: Float[Tensor, "m V"], is_open: Bool[Tensor, "m V"], *keys: Int[Tensor, "m"]
    ) -> Bool[Tensor, "m V"]:
        """True for the tokens that can have the largest score: few, as scores in fp64 cost more than all else.

        exp(-score) is, but for a factor that all of a row share, an exponential number of rate p / (sum of the open p).
        The smallest one exceeds `_NEVER` with probability exp(-_NEVER), so a token whose own exceeds that cannot win.
        """
        if _SCARCE * int(is_open.count_nonzero()) < is_open.numel():
            return is_open
        limit = p * is_open
        limit *= _NEVER / limit.sum(dim=-1, keepdim=True)
        token = torch.arange(p.shape[1], device=p.device)
        size = len(token) if p.is_cuda else max(1, _CACHED // max(1, len(p)))
        pieces = zip(limit.split(size, dim=-1), token.split(size), strict=True)
        rows = [key.unsqueeze(1) for key in keys]
        return torch.cat([noise.may_be_below(some, self.seed, Purpose.VALUE, *rows, of) for some, of in pieces], dim=-1)

    def _scores(self, logits: Float[Tensor, "..."], *keys: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        return noise.wide(logits) / self.temperature + noise.gumbel(self.seed, Purpose.VALUE, *keys)


def _below_largest(logits: Float[Tensor, "m V"]) -> Float[Tensor, "m V"]:
    """Subtracts each row's largest: divided by a small temperature no entry is then too large for its format."""
    return logits - logits.amax(dim=-1, keepdim=True)


_COLDEST = 1e-30
"""Least temperature for fp32, in which 0 / 1e-300 is nan; below it a softmax is the same, 0 but for the likeliest."""
_FEW = 1024
"""Tokens that are sorted at once."""
_CACHED = 2**15
"""Noise whose intermediate results stay in a CPU's cache."""
_SCARCE = 16
"""Tokens for each one that is kept, from which on noise for those that are kept alone costs less."""
_NEVER = 64
"""exp(-64) is less than the chance that a computer errs."""
