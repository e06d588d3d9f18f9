"""Truncates a distribution to its likeliest values: `top_k` and `top_p`, over any vocabulary.

Both limits are of one kind: a token is kept if what comes before it, counted (`top_k`) or by probability (`top_p`),
stays below the limit. The likelier token comes first, of equal ones the lower.

Dimensions: m positions, V vocabulary, N bins.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.noise import wide, widest

_MARGIN = 1e-4
"""More than the relative error of a sum of probabilities in fp32."""
_NEAREST, _FARTHEST = -12, 8
"""Distances from the likeliest token that bins tell apart: 2^-12 to 2^8 nats."""


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


@dataclass(frozen=True)
class TokenBins:
    """Each row's tokens in bins, which tell what `truncated` keeps of most of them without a sort.

    A sort of a large vocabulary would take longer than all else. All tokens of a bin come before those of the next. It
    is the upper bits of the fp32 number `max(logits) - logit`, so that one bin holds few tokens, however they lie.
    There are fewer bins than tokens: about V / 256 for each doubling of the distance.
    """

    bin: Int[Tensor, "m V"]
    limits: list[tuple[float, Float[Tensor, "m V"], Float[Tensor, "m N"]]]
    """A limit, what each token adds up to it, and the sum of that over each bin and all before it."""

    @staticmethod
    def of(
        logits: Float[Tensor, "m V"], p: Float[Tensor, "m V"], top_k: int | None, top_p: float | None
    ) -> "TokenBins":
        """Puts the tokens of each row into bins; `p` is softmax(logits) in fp32."""
        distance = (logits.amax(dim=-1, keepdim=True) - logits).float()
        bits = max(0, logits.shape[1].bit_length() - 8)  # of 23 in fp32, behind the exponent, in which 127 means 2^0
        first, last = ((127 + exponent) << bits for exponent in (_NEAREST, _FARTHEST))
        place = (distance.view(torch.int32) >> (23 - bits)).clamp_(first, last).sub_(first).long()
        added: list[tuple[float, Tensor]] = []
        if top_k is not None:
            added.append((float(top_k), logits.new_ones((), dtype=widest(logits.device)).expand_as(logits)))
        if top_p is not None:
            added.append((top_p, wide(p)))
        empty = logits.new_zeros(len(logits), last - first + 1, dtype=widest(logits.device))
        return TokenBins(place, [(limit, of, empty.scatter_add(-1, place, of).cumsum_(dim=-1)) for limit, of in added])

    def is_open(self) -> Bool[Tensor, "m V"]:
        """True for all tokens that are kept, and at most the rest of a bin or so beside them."""
        last = [(total < limit * (1 + _MARGIN)).sum(dim=-1, keepdim=True) for limit, _, total in self.limits]
        return self.bin <= torch.stack(last).amin(dim=0)

    def is_kept(self, token: Int[Tensor, "m"]) -> Bool[Tensor, "m"]:
        """True if the one `token` of each row is kept even if all others of its bin come before it."""
        at = token.unsqueeze(-1)
        own = self.bin.gather(-1, at)
        kept = [total.gather(-1, own) - of.gather(-1, at) < limit * (1 - _MARGIN) for limit, of, total in self.limits]
        return torch.cat(kept, dim=-1).all(dim=-1)
