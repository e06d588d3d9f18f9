"""Which masked positions become visible next: the rule that training (PUMA) and decoding share.

A *confidence* is a statistic of the model's prediction at one position; larger means surer, hence revealed earlier.
An *order* turns confidences into scores over the whole row. A *rule* picks positions from the scores.

Dimensions: B rows, L positions, M scored positions, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Scores = Float[Tensor, "B L"]

# --- confidences: log-probabilities (M, V) -> (M,) -------------------------------------------------------------------


def prob(log_probs: Float[Tensor, "M V"]) -> Float[Tensor, "M"]:
    """Largest probability, `max_v p(v)`."""
    return log_probs.amax(dim=-1).exp()


def margin(log_probs: Float[Tensor, "M V"]) -> Float[Tensor, "M"]:
    """Lead of the best value over the second, `p(v1) - p(v2)` (Kim et al. 2025, 2502.06768)."""
    best, second = log_probs.topk(2, dim=-1).values.exp().unbind(-1)
    return best - second


def neg_entropy(log_probs: Float[Tensor, "M V"]) -> Float[Tensor, "M"]:
    """Negative entropy in nats, `sum_v p(v) log p(v)`; 0 for a certain prediction, below 0 otherwise."""
    return -torch.special.entr(log_probs.exp()).sum(dim=-1)


CONFIDENCES: dict[str, Callable[[Tensor], Tensor]] = {"prob": prob, "margin": margin, "neg_entropy": neg_entropy}

# --- orders ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """How positions are ranked: `score(confidence, uniform)` with larger = revealed earlier.

    `confidence` names the statistic that the model must provide. `uniform()` draws noise in [0, 1) of the scores'
    shape; it is called only by orders that need it.
    """

    confidence: str
    score: Callable[[Scores, Callable[[], Scores]], Scores]


def _by_confidence(confidence: Scores, uniform: Callable[[], Scores]) -> Scores:
    return confidence


def _by_noise(confidence: Scores, uniform: Callable[[], Scores]) -> Scores:
    return uniform()


def _by_position(confidence: Scores, uniform: Callable[[], Scores]) -> Scores:
    return -torch.arange(confidence.shape[-1], device=confidence.device, dtype=confidence.dtype).expand_as(confidence)


ORDERS: dict[str, Order] = {
    **{name: Order(confidence=name, score=_by_confidence) for name in CONFIDENCES},
    "random": Order(confidence="prob", score=_by_noise),
    "left_to_right": Order(confidence="prob", score=_by_position),
}

# --- what is revealed ------------------------------------------------------------------------------------------------


def surest(score: Scores, eligible: Bool[Tensor, "B L"], count: Int[Tensor, "B"]) -> Bool[Tensor, "B L"]:
    """The `count` eligible positions of highest score in each row; all of them where fewer are eligible.

    Equal scores go to the lower position, so that the choice is a function of the row alone.
    """
    ranked = score.masked_fill(~eligible, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(ranked).scatter_(
        -1, ranked, torch.arange(score.shape[-1], device=score.device).expand_as(ranked)
    )
    return eligible & (rank < count.unsqueeze(-1))


def above(top1: Scores, eligible: Bool[Tensor, "B L"], threshold: float) -> Bool[Tensor, "B L"]:
    """The eligible positions whose largest probability exceeds `threshold`, whatever orders the reveals."""
    return eligible & (top1 > threshold)


@dataclass(frozen=True, kw_only=True)
class RevealState:
    """What a rule may look at: never the hidden truth, or the reveals would leak it into training."""

    score: Scores
    eligible: Bool[Tensor, "B L"]
    step: Int[Tensor, "B"]
    """Steps that the row has behind it."""
    num_eligible_at_start: Int[Tensor, "B"]


@runtime_checkable
class RevealRule(Protocol):
    """A decoder's choice of the positions to reveal in this step: at least one in each row that has any eligible."""

    def __call__(self, state: RevealState) -> Bool[Tensor, "B L"]: ...


@dataclass(frozen=True)
class Fixed:
    """The same number of positions in every step."""

    tokens_per_step: int

    def __call__(self, state: RevealState) -> Bool[Tensor, "B L"]:
        return surest(state.score, state.eligible, torch.full_like(state.step, self.tokens_per_step))


@dataclass(frozen=True)
class Steps:
    """A row of n masked positions is done in `num_steps` steps: after step k, `floor(n k / num_steps)` are revealed.

    A row with fewer positions than steps reveals one a step.
    """

    num_steps: int

    def __call__(self, state: RevealState) -> Bool[Tensor, "B L"]:
        start = state.num_eligible_at_start
        num_left_after = start - (state.step + 1) * start // self.num_steps
        count = (state.eligible.sum(dim=-1) - num_left_after).clamp(min=1)
        return surest(state.score, state.eligible, count)
