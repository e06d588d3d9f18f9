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
            own = [key[row].unsqueeze(1) for key in keys]
            if not self._is_truncated:
                return self._scores(logits, *own, token)
            if self.top_k is None or self.top_k * 8 > len(token):
                size = len(token) if logits.is_cuda else max(1, _CACHED // max(1, len(row)))
                pieces = zip(logits.split(size, dim=-1), token.split(size), strict=True)
                scores = torch.cat([self._scores(some, *own, of) for some, of in pieces], dim=-1)
            else:  # noise costs more than all else: only that of tokens that may be drawn is made
                least = logits.topk(self.top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
                i, v = (logits >= least).nonzero().unbind(-1)
                drawn = self._scores(logits[i, v], *(key[i, 0] for key in own), token[v])
                scores = drawn.new_full(logits.shape, -torch.inf).index_put_((i, v), drawn)
            return within_limits(scores, logits, self.temperature, self.top_k, self.top_p)

        return perturb

    def _scores(self, logits: Float[Tensor, "..."], *keys: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        return logits.double() / self.temperature + noise.gumbel(self.seed, Purpose.VALUE, *keys)


_CACHED = 2**15
"""Scores whose intermediate results stay in a CPU's cache."""
_MARGIN = 1e-4
"""More than the error of a sum of probabilities in fp32."""


def within_limits(
    scores: Float[Tensor, "m V"],
    logits: Float[Tensor, "m V"],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Float[Tensor, "m V"]:
    """Lowers scores to -inf until the largest of each row is of a token that `truncated` keeps of logits / temperature.

    Then it is the largest of all that are kept. Hardly anything is sorted, which would take longer than all else: a
    token is kept if few enough come before it, and if it is not, no token after it is. Of scores that are draws from
    the softmax few are lowered: ln(1 / mass that is kept) times on average. Changes `scores`.
    """
    token = torch.arange(logits.shape[1], device=logits.device)
    whole, row, p = logits, torch.arange(len(logits), device=logits.device), logits
    if top_p is not None:  # in fp32; what is too close to tell is decided in fp64
        p = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)
    unsure, open_scores = [], scores
    while True:
        best = open_scores.argmax(dim=-1, keepdim=True)
        least, is_kept = logits.gather(-1, best), torch.ones_like(row, dtype=torch.bool)
        # Most draws are within the limits even if all that are as likely count as before them.
        count = (logits >= least).sum(dim=-1)
        if top_k is not None:
            is_kept &= count <= top_k
        if top_p is not None:
            own = p.gather(-1, best)
            mass = (p - own).clamp_(min=0).sum(dim=-1) + own.squeeze(-1) * (count - 1)
            is_kept &= mass < top_p - _MARGIN
        still = (~is_kept).nonzero().squeeze(-1)
        if not len(still):
            break
        row, logits, p, best, least = row[still], logits[still], p[still], best[still], least[still]
        is_before = (logits > least) | ((logits == least) & (token < best))
        is_over = torch.zeros_like(row, dtype=torch.bool)
        if top_k is not None:
            is_over |= is_before.sum(dim=-1) >= top_k
        if top_p is not None:
            mass = (p * is_before).sum(dim=-1)
            unsure.append(row[~is_over & ((mass - top_p).abs() <= _MARGIN)])
            is_over |= mass > top_p + _MARGIN
        left = is_over.nonzero().squeeze(-1)
        row, logits, p = row[left], logits[left], p[left]
        open_scores = scores[row] + is_before[left].double().log()  # adds 0 or -inf; filling in takes longer
        scores[row] = open_scores
    if len(row := torch.cat([row[:0], *unsure])):
        is_cut = truncated(whole[row].double() / temperature, top_k, top_p) == -torch.inf
        scores[row] = scores[row].masked_fill(is_cut, -torch.inf)
    return scores


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
