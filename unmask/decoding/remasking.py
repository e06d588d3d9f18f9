"""Rules that mask again what was revealed, so that a decoder can correct itself.

They take the number of steps that is asked for, as the papers' samplers do: more steps than masked positions are more
chances to correct. After step k of T, `floor(n k / T)` of n positions are visible, as `reveal.NumSteps` asks for. Where
that grows by less than one a step, ReMDM reveals at least one in every step, P2 and RCR where a step would change
nothing; a row is done as soon as nothing in it is masked.
Dimensions: b rows, L positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unmask.noise import wide
from unmask.reveal import NumSteps, RevealRule, RevealState, most_confident

Reveals = Bool[Tensor, "b L"]


@dataclass(frozen=True, kw_only=True)
class Revealed:
    """The decoder's record of revealed positions, as far as remasking needs it."""

    is_revealed: Bool[Tensor, "b L"]
    confidence: Float[Tensor, "b L"]
    """The largest probability when a position was revealed."""
    log_prob: Float[Tensor, "b L"]
    """Log-probability of the values at masked positions, and of the tokens at revealed ones: now, for rules that read
    them; else as it was when they were revealed."""
    uniform: Callable[[], Float[Tensor, "b L"]]
    """Draws noise in [0, 1)."""


@runtime_checkable
class Remasking(Protocol):
    """Chooses what is revealed, and what is masked again, in one step."""

    reads_revealed: ClassVar[bool]
    """True if the model is queried at revealed positions too."""

    def __call__(self, state: RevealState, revealed: Revealed, rule: RevealRule) -> tuple[Reveals, Reveals]: ...


@dataclass(frozen=True)
class Remdm:
    """ReMDM (2503.00307): a revealed token is masked again with probability sigma; then as many more are revealed.

    A step takes the visible share from alpha_t to alpha_s. sigma is at most `(1 - alpha_s) / alpha_t`: as many as are
    to be masked afterwards, on average. Here never more than that: of those drawn, the ones of smallest noise are
    taken.
    """

    eta: float = 1.0
    reads_revealed: ClassVar[bool] = False

    def _sigma(self, largest: Float[Tensor, "b 1"], revealed: Revealed) -> Float[Tensor, "b L"]:
        raise NotImplementedError

    def __call__(self, state: RevealState, revealed: Revealed, rule: RevealRule) -> tuple[Reveals, Reveals]:
        assert isinstance(rule, NumSteps), "remasking needs a number of steps"
        start = wide(state.num_masked_at_start)
        num_left = rule.num_left_after(state)
        largest = (num_left / (start - state.num_masked).clamp(min=1)).clamp(max=1.0)  # (1 - alpha_s) / alpha_t
        u = revealed.uniform()
        is_drawn = revealed.is_revealed & (u < self._sigma(largest.unsqueeze(1), revealed))
        is_again = most_confident(-u, is_drawn, num_left)
        return rule(replace(state, num_masked=state.num_masked + is_again.sum(dim=-1))), is_again


class RemdmCap(Remdm):
    """`sigma = min(eta, sigma_max)`."""

    def _sigma(self, largest: Float[Tensor, "b 1"], revealed: Revealed) -> Float[Tensor, "b L"]:
        return largest.clamp(max=self.eta).expand(revealed.is_revealed.shape)


class RemdmRescale(Remdm):
    """`sigma = eta sigma_max`."""

    def _sigma(self, largest: Float[Tensor, "b 1"], revealed: Revealed) -> Float[Tensor, "b L"]:
        return (self.eta * largest).expand(revealed.is_revealed.shape)


class RemdmConfidence(Remdm):
    """`sigma_i = eta sigma_max softmax(-c)_i`, c the confidences with which the tokens were revealed."""

    def _sigma(self, largest: Float[Tensor, "b 1"], revealed: Revealed) -> Float[Tensor, "b L"]:
        doubt = (-revealed.confidence).masked_fill(~revealed.is_revealed, -torch.inf)
        return self.eta * largest * doubt.softmax(dim=-1).nan_to_num()


@dataclass(frozen=True)
class Ranked:
    """Of all positions, masked or not, those with the likeliest tokens are visible, as many as the steps ask for.

    Revealed tokens are ranked by `eta log p`: at eta = 0 none is masked again. Masked ones by log p of the value that
    would be written now.
    """

    eta: float = 1.0
    reads_revealed: ClassVar[bool]

    def __call__(self, state: RevealState, revealed: Revealed, rule: RevealRule) -> tuple[Reveals, Reveals]:
        assert isinstance(rule, NumSteps), "remasking needs a number of steps"
        # Of positions whose log p is rounded to 0 the revealed ones come first: else ties would mask tokens again, even
        # at eta = 0.
        unsure = revealed.log_prob.clamp(max=-torch.finfo(revealed.log_prob.dtype).tiny)
        log_prob = torch.where(revealed.is_revealed, (self.eta * revealed.log_prob).nan_to_num(), unsure)
        candidates, start = state.eligible | revealed.is_revealed, state.num_masked_at_start
        num_visible = (start - rule.num_left_after(state)).maximum(start - state.num_masked).clamp(min=1)
        is_visible = most_confident(log_prob, candidates, num_visible)
        is_same = (is_visible == revealed.is_revealed).all(dim=-1)  # the next step would read the same canvas again
        is_visible = most_confident(log_prob, candidates, num_visible + is_same)
        return state.eligible & is_visible, revealed.is_revealed & ~is_visible


class P2(Ranked):
    """P2, self-planning (2502.03540): p of a revealed token is what the model, which reads it, gives it now."""

    reads_revealed = True


class Rcr(Ranked):
    """Running confidence remasking (MDPO, 2508.13148): p of a revealed token is what it had when it was revealed.

    Every step fills in all that is masked, and masks again what was least sure when it was filled in, however long ago.
    """

    reads_revealed = False


REMASKINGS: dict[str, Callable[[float], Remasking]] = {
    "remdm_cap": RemdmCap,
    "remdm_rescale": RemdmRescale,
    "remdm_confidence": RemdmConfidence,
    "p2": P2,
    "rcr": Rcr,
}
