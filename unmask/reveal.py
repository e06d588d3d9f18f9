"""The choice of the masked positions that become visible next, shared by training (PUMA) and decoding.

A *confidence* is a statistic of the model's prediction at one position; larger means surer, hence revealed earlier.
An *order* turns confidences into scores over the whole row. A *rule* picks positions from the scores.

Dimensions: B rows (of canvases, or of blocks: any leading ones), L positions, M scored positions, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from unmask.config.settings import Section, known
from unmask.errors import require
from unmask.noise import wide

Scores = Float[Tensor, "*B L"]

# --- confidences: log-probabilities (M, V) -> (M,) -------------------------------------------------------------------


def prob(log_probs: Float[Tensor, "M V"]) -> Float[Tensor, "M"]:
    """Returns the largest probability, `max_v p(v)`."""
    return log_probs.amax(dim=-1).exp()


def margin(log_probs: Float[Tensor, "M V"]) -> Float[Tensor, "M"]:
    """Returns the lead of the best value over the second, `p(v1) - p(v2)` (Kim et al. 2025, 2502.06768)."""
    best, second = log_probs.topk(2, dim=-1).values.exp().unbind(-1)
    return best - second


def neg_entropy(log_probs: Float[Tensor, "M V"]) -> Float[Tensor, "M"]:
    """Returns the negative entropy in nats, `sum_v p(v) log p(v)`; 0 for a certain prediction, else below 0."""
    return -torch.special.entr(log_probs.exp()).sum(dim=-1)


CONFIDENCES: dict[str, Callable[[Tensor], Tensor]] = {"prob": prob, "margin": margin, "neg_entropy": neg_entropy}

# --- orders ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """A ranking of positions: `score(confidence, uniform)`, larger = revealed earlier.

    `confidence` names the statistic that the model must provide. `uniform()` draws noise in [0, 1) of the scores'
    shape; it is called only by orders that need it. `in_nats(score)` ranks alike, on the scale of a log-probability.
    """

    confidence: str
    score: Callable[[Scores, Callable[[], Scores]], Scores]
    in_nats: Callable[[Scores], Scores] = lambda score: score

    def noisy(self, score: Scores, gumbel: Scores, scale: Float[Tensor, "*B 1"]) -> Scores:
        """Returns `in_nats(score) + scale * gumbel`; its largest is i with P `softmax(in_nats(score) / scale)_i`."""
        return self.in_nats(score) + scale * gumbel


def _by_confidence(confidence: Scores, uniform: Callable[[], Scores]) -> Scores:
    return confidence


def _by_noise(confidence: Scores, uniform: Callable[[], Scores]) -> Scores:
    return uniform()


def _by_position(confidence: Scores, uniform: Callable[[], Scores]) -> Scores:
    return -torch.arange(confidence.shape[-1], device=confidence.device, dtype=confidence.dtype).expand_as(confidence)


def _by_position_from_the_end(confidence: Scores, uniform: Callable[[], Scores]) -> Scores:
    return -_by_position(confidence, uniform)


def _log(score: Scores) -> Scores:
    return score.clamp(min=torch.finfo(score.dtype).tiny).log()


def _log_odds(margin: Scores) -> Scores:
    """Returns `log((1 + m) / (1 - m))`, which is `log p(v1) - log p(v2)` if two values share all mass."""
    return 2 * margin.clamp(0, 1 - torch.finfo(margin.dtype).eps).atanh()


ORDERS: dict[str, Order] = {
    "prob": Order(confidence="prob", score=_by_confidence, in_nats=_log),
    "margin": Order(confidence="margin", score=_by_confidence, in_nats=_log_odds),
    "neg_entropy": Order(confidence="neg_entropy", score=_by_confidence),
    "random": Order(confidence="prob", score=_by_noise),
    "left_to_right": Order(confidence="prob", score=_by_position),
    "right_to_left": Order(confidence="prob", score=_by_position_from_the_end),
}

_ORDER_ALIASES = {
    "low_confidence": "prob",
    "maskgit_plus": "prob",
    "top_k_margin": "margin",
    "topk_margin": "margin",
    "entropy": "neg_entropy",
}

OrderName = Annotated[
    str,
    BeforeValidator(lambda value: _ORDER_ALIASES.get(value, value) if isinstance(value, str) else value),
    known("order", ORDERS),
]
"""A key of `ORDERS`, or the name that LLaDA, Dream or PUMA has for it."""

# --- what is revealed ------------------------------------------------------------------------------------------------


def most_confident(score: Scores, eligible: Bool[Tensor, "*B L"], count: Int[Tensor, "*B"]) -> Bool[Tensor, "*B L"]:
    """Chooses the `count` eligible positions of highest score in each row; all of them where fewer are eligible.

    Equal scores go to the lower position, so that the choice is a function of the row alone.
    """
    ranked = _ranked(score, eligible)
    rank = torch.empty_like(ranked).scatter_(
        -1, ranked, torch.arange(score.shape[-1], device=score.device).expand_as(ranked)
    )
    return eligible & (rank < count.unsqueeze(-1))


@dataclass(frozen=True, kw_only=True)
class RevealState:
    """The input of a rule: never the hidden truth, or the reveals would leak it into training."""

    score: Scores
    eligible: Bool[Tensor, "*B L"]
    """True where masked, in the block that is being decoded."""
    top1: Scores
    """The largest probability at each position; anything where not eligible."""
    entropy: Scores | None
    """In nats; only for rules that need it."""
    step: Int[Tensor, "*B"]
    """Number of steps that the row has been through."""
    num_masked: Int[Tensor, "*B"]
    """Masked positions of the whole row, whatever is eligible."""
    num_masked_at_start: Int[Tensor, "*B"]
    """`num_masked` before the first step."""


@runtime_checkable
class RevealRule(Protocol):
    """A choice of the positions to reveal in this step: at least one in each row that has any eligible.

    A rule that reads `RevealState.entropy` has the attribute `needs_entropy = True`.
    """

    def __call__(self, state: RevealState) -> Bool[Tensor, "*B L"]: ...


@dataclass(frozen=True)
class Fixed:
    """Reveals the same number of positions in every step."""

    tokens_per_step: int

    def __post_init__(self) -> None:
        require(self.tokens_per_step >= 1, "tokens_per_step", self.tokens_per_step, "1 or more")

    def __call__(self, state: RevealState) -> Bool[Tensor, "*B L"]:
        return most_confident(state.score, state.eligible, torch.full_like(state.step, self.tokens_per_step))


@dataclass(frozen=True)
class NumSteps:
    """Finishes a row of n masked positions in `num_steps` steps: after step k, `floor(n k / num_steps)` are visible.

    A row with fewer positions than steps reveals one a step. In blocks the quota is the whole row's: a block that has
    fewer left than a step's share ends with them.
    """

    num_steps: int

    def __post_init__(self) -> None:
        require(self.num_steps >= 1, "num_steps", self.num_steps, "1 or more")

    def num_left_after(self, state: RevealState) -> Int[Tensor, "*B"]:
        """Returns the number of positions of the row that stay masked after this step."""
        start = state.num_masked_at_start
        return start - (state.step + 1) * start // self.num_steps

    def __call__(self, state: RevealState) -> Bool[Tensor, "*B L"]:
        count = state.num_masked - self.num_left_after(state)
        return most_confident(state.score, state.eligible, count.clamp(min=1))


@dataclass(frozen=True)
class CosineSteps(NumSteps):
    """Reveals few positions at first: after step k, `floor(n cos(pi k / (2 num_steps)))` are masked (MaskGIT)."""

    def num_left_after(self, state: RevealState) -> Int[Tensor, "*B"]:
        shares = _cosine_shares(self.num_steps, state.step.device)
        return state.num_masked_at_start * shares[(state.step + 1).clamp(max=self.num_steps)] >> _SHARE_BITS


_SHARE_BITS = 36


@lru_cache(maxsize=16)
def _cosine_shares(num_steps: int, device: torch.device) -> Int[Tensor, "T"]:
    """Returns `cos(pi k / (2 num_steps))` for k = 0 .. num_steps, in whole numbers of 2^-36: alike on all devices."""
    # 1e-9, as that of 60 degrees, rounded, may be less than 1/2.
    cosines = [math.cos(math.pi * k / (2 * num_steps)) + 1e-9 for k in range(num_steps + 1)]
    return torch.tensor([int(cosine * 2**_SHARE_BITS) for cosine in cosines], device=device)


@dataclass(frozen=True)
class Threshold:
    """Reveals all whose largest probability exceeds `threshold`, and the one of highest score (Fast-dLLM)."""

    threshold: float

    def __post_init__(self) -> None:
        require(0 < self.threshold <= 1, "threshold", self.threshold, "a probability above 0, 1 at most")

    def __call__(self, state: RevealState) -> Bool[Tensor, "*B L"]:
        is_sure = state.eligible & (state.top1 > self.threshold)
        return is_sure | most_confident(state.score, state.eligible, torch.ones_like(state.step))


@dataclass(frozen=True)
class Factor:
    """Reveals the first n by score, n the largest with `(n + 1)(1 - c) < factor`, c their smallest top-1 probability.

    At least one. With factor 1, decoding n at once is what decoding them one by one would have given (Fast-dLLM,
    2505.22618, theorem 1).
    """

    factor: float

    def __post_init__(self) -> None:
        require(self.factor > 0, "factor", self.factor, "more than 0")

    def __call__(self, state: RevealState) -> Bool[Tensor, "*B L"]:
        ranked = _ranked(state.score, state.eligible)
        smallest = state.top1.gather(-1, ranked).cummin(dim=-1).values
        n = torch.arange(1, ranked.shape[-1] + 1, device=ranked.device)
        return _first(state, (n + 1) * (1 - smallest) < self.factor, ranked)


@dataclass(frozen=True)
class EntropyBound:
    """Reveals the largest prefix by score with `sum(H) - max(H) <= gamma` nats, at least one (EB-sampler, 2505.24857).

    The bound is on what revealing them independently of each other can lose.
    """

    needs_entropy: ClassVar[bool] = True
    gamma: float

    def __post_init__(self) -> None:
        require(self.gamma >= 0, "entropy_bound", self.gamma, "0 or more")

    def __call__(self, state: RevealState) -> Bool[Tensor, "*B L"]:
        assert state.entropy is not None, "a rule with needs_entropy is given the entropy"
        ranked = _ranked(state.score, state.eligible)
        entropy = state.entropy.gather(-1, ranked)
        lost = entropy.cumsum(dim=-1) - entropy.cummax(dim=-1).values
        return _first(state, lost <= self.gamma, ranked)


@dataclass(frozen=True)
class ErrorBudget:
    """Reveals the largest prefix by score with `sum(1 - p) < budget`, p the largest probabilities; at least one.

    By the union bound, the probability that any of their greedy values is not the one that the model would draw there
    is below the budget.
    """

    budget: float

    def __post_init__(self) -> None:
        require(self.budget > 0, "budget", self.budget, "more than 0")

    def __call__(self, state: RevealState) -> Bool[Tensor, "*B L"]:
        ranked = _ranked(state.score, state.eligible)
        error = (1 - wide(state.top1.gather(-1, ranked))).cumsum(dim=-1)
        return _first(state, error < self.budget, ranked)


def _ranked(score: Scores, eligible: Bool[Tensor, "*B L"]) -> Int[Tensor, "*B L"]:
    """Ranks positions, the eligible one of highest score first; the lower one among equals."""
    return score.masked_fill(~eligible, -torch.inf).argsort(dim=-1, descending=True, stable=True)


def _first(state: RevealState, is_allowed: Bool[Tensor, "*B L"], ranked: Int[Tensor, "*B L"]) -> Bool[Tensor, "*B L"]:
    """Chooses eligible positions for as long as the ranked ones are allowed; at least one."""
    count = (is_allowed & state.eligible.gather(-1, ranked)).long().cumprod(dim=-1).sum(dim=-1)
    return most_confident(state.score, state.eligible, count.clamp(min=1))


SCHEDULES: dict[str, Callable[[int], RevealRule]] = {"linear": NumSteps, "cosine": CosineSteps}
"""Rules that take a number of steps, by the name of their schedule."""

PARALLEL_RULES: dict[str, Callable[[float], RevealRule]] = {
    "threshold": Threshold,
    "factor": Factor,
    "entropy_bound": EntropyBound,
    "budget": ErrorBudget,
}
"""Rules that reveal as much as the model is sure of, by the field of `RevealSettings` that asks for them.

A new rule is a class with `__call__`, a line here and a field below: then it works in `process.*`, `decode.*` and
`--decoder`.
"""


class RevealSettings(Section):
    """The settings that training pools and the decoder share: what is revealed first, and how much at once.

    A rule of `PARALLEL_RULES` is asked for by the field of its name; at most one is set.
    """

    section: ClassVar[str] = "process"
    """Name of the section in a recipe, for messages."""
    aliases: ClassVar[dict[str, str]] = {"confidence": "order", "alg": "order", "confidence_threshold": "threshold"}
    exclusive: ClassVar[tuple[str, ...]] = tuple(PARALLEL_RULES)
    """Keys that say how much is revealed; at most one is set."""
    alternatives = tuple(PARALLEL_RULES)

    order: OrderName = Field("prob", description=f"what is revealed first: {', '.join(ORDERS)}")
    threshold: float | None = Field(
        None, gt=0, le=1, description="reveal all whose largest probability exceeds it (0.9 in 2505.22618)"
    )
    factor: float | None = Field(
        None, gt=0, description="reveal the n most confident, n the largest with (n + 1)(1 - probability) < factor"
    )
    entropy_bound: float | None = Field(
        None, ge=0, description="reveal as many as may lose so many nats by being drawn independently"
    )
    budget: float | None = Field(
        None, gt=0, description="reveal the n most confident, n the largest with sum(1 - probability) < budget"
    )

    @model_validator(mode="before")
    @classmethod
    def _replace_default(cls, given: Any) -> Any:
        """Lets a rule that is given take the place of one that is on by default."""
        if not isinstance(given, dict):
            return given
        given = cls.rename_aliases(given)  # this validator is called before the parent's
        is_given = any(given.get(key) is not None for key in PARALLEL_RULES)
        return {**dict.fromkeys(PARALLEL_RULES), **given} if is_given else given

    @model_validator(mode="after")
    def _check_alternatives(self) -> "RevealSettings":
        asked = [key for key in self.exclusive if getattr(self, key) is not None]
        if len(asked) > 1:
            values = " and ".join(f"{self.section}.{key}={getattr(self, key)}" for key in asked)
            raise ValueError(f"{values}: give one of them")
        return self

    def rule(self) -> RevealRule | None:
        """Returns the rule of `PARALLEL_RULES` that is asked for, or None."""
        asked = ((key, getattr(self, key)) for key in PARALLEL_RULES)
        return next((PARALLEL_RULES[key](value) for key, value in asked if value is not None), None)
