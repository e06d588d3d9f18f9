"""The values that pass between the parts of `unmask`: batches, statistics, predictions and decoded canvases.

Dimensions: B rows, L positions, M scored positions, V vocabulary. Tokens: `x0` clean, `xt` masked.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.errors import UserError, choose
from unmask.noise import widest
from unmask.reveal import CONFIDENCES


@dataclass(frozen=True, kw_only=True)
class TokenSpec:
    """The vocabulary and canvas of a task. `vocab_size` counts the mask token, whose id is `mask_id`."""

    vocab_size: int
    length: int
    mask_id: int
    eos_id: int | None = None
    pad_id: int | None = None
    fingerprint: str | None = None
    """Hash of a text vocabulary: with equal fingerprints, equal ids mean the same tokens."""


@dataclass(frozen=True, kw_only=True)
class CleanBatch:
    """Examples of a task. Where `prompt_mask` is True the position belongs to the prompt and is never masked."""

    x0: Int[Tensor, "B L"]
    """Clean tokens; `mask_id` in place of an answer that is not known as tokens."""
    prompt_mask: Bool[Tensor, "B L"]
    answers: tuple[Any, ...] | None = None
    """Reference answers for grading, one per row, or None if `x0` is enough to grade by."""

    def __post_init__(self) -> None:
        for name, value, dtype in (("x0", self.x0, torch.long), ("prompt_mask", self.prompt_mask, torch.bool)):
            if not isinstance(value, Tensor):
                raise UserError(f"{name}: is a {type(value).__name__}; make it a tensor of {dtype}")
            if value.dtype != dtype:
                raise UserError(f"{name}: is of {value.dtype}; make it {dtype}, with .to({dtype})")

    def __len__(self) -> int:
        return len(self.x0)

    def __getitem__(self, rows: slice) -> "CleanBatch":
        answers = None if self.answers is None else self.answers[rows]
        return CleanBatch(x0=self.x0[rows], prompt_mask=self.prompt_mask[rows], answers=answers)

    def at(self, rows: Int[Tensor, "n"]) -> "CleanBatch":
        """Selects these rows."""
        answers = None if self.answers is None else tuple(self.answers[row] for row in rows.tolist())
        return CleanBatch(x0=self.x0[rows], prompt_mask=self.prompt_mask[rows], answers=answers)

    def to(self, device: torch.device | str) -> "CleanBatch":
        """Copies the tensors to `device`, as `to_device` does."""
        return CleanBatch(
            x0=to_device(self.x0, device), prompt_mask=to_device(self.prompt_mask, device), answers=self.answers
        )

    def is_known(self, mask_id: int) -> bool:
        """True if all answers are known as tokens, so that they have a likelihood."""
        return not bool(((self.x0 == mask_id) & ~self.prompt_mask).any())

    def answer_mask(self, eos_id: int | None) -> Bool[Tensor, "B L"]:
        """True at the answer: what follows the prompt, up to and including the first `eos_id`; all of it if None.

        Where a row has several answers, between them more of the prompt, each ends with its own first `eos_id`.
        """
        eligible = ~self.prompt_mask
        if eos_id is None:
            return eligible
        is_end = eligible & (self.x0 == eos_id)
        num_ends = is_end.cumsum(dim=-1)
        num_before_answer = torch.where(self.prompt_mask, num_ends, 0).cummax(dim=-1).values
        return eligible & (num_ends - is_end.long() == num_before_answer)

    def masked(self, mask_id: int) -> Int[Tensor, "B L"]:
        """Returns the canvas at t = 1: the prompt, and `mask_id` everywhere else."""
        return torch.where(self.prompt_mask, self.x0, mask_id)


@dataclass(frozen=True, kw_only=True)
class MaskedBatch:
    """A masked training batch: the input of one step, the positions to score, and their weights."""

    x0: Int[Tensor, "B L"]
    xt: Int[Tensor, "B L"]
    """`x0` with `mask_id` at the masked positions."""
    scored: Int[Tensor, "M"]
    """Flat positions whose `x0` is predicted, ascending. Padding entries are B * L, one past the end."""
    weight: Float[Tensor, "M"]
    """Factor of each position's NLL in the loss; 0 on padding."""
    step: int | None = None
    """Training step; keys the model's own noise. None outside training."""
    estimate: Float[Tensor, "B L D"] | None = None
    """A self-conditioned model's estimate for these rows from the step before, 0 where they are no longer masked."""
    is_carried: bool = False
    """True if the rows come back in the next step, which takes this step's estimate of them as its `estimate`."""

    def to(self, device: torch.device | str) -> "MaskedBatch":
        """Copies the tensors to `device`, as `to_device` does."""
        x0, xt, scored, weight = (to_device(each, device) for each in (self.x0, self.xt, self.scored, self.weight))
        estimate = None if self.estimate is None else to_device(self.estimate, device)
        return replace(self, x0=x0, xt=xt, scored=scored, weight=weight, estimate=estimate)

    @property
    def at(self) -> Int[Tensor, "M"]:
        """Returns `scored` with all indices inside the batch."""
        # Padding repeats the first scored position, whose NLL is finite: 0 * inf, at a prompt that the model cannot
        # predict, would be NaN in the loss.
        size = self.x0.numel()
        return torch.where(self.scored < size, self.scored, self.scored[:1]).clamp(max=size - 1)

    def gather(self, values: Tensor) -> Tensor:
        """Selects the scored positions: (B, L, *rest) -> (M, *rest)."""
        return values.flatten(0, 1).index_select(0, self.at)

    def scatter(self, values: Float[Tensor, "M"], fill: float) -> Float[Tensor, "B L"]:
        """Puts `values` at the scored positions and `fill` elsewhere: (M,) -> (B, L)."""
        # One entry more than the canvas has takes what padding writes, and is cut off.
        flat = values.new_full((self.x0.numel() + 1,), fill)
        return flat.scatter(0, self.scored, values)[:-1].view(self.x0.shape)

    def split(self, parts: int) -> list["MaskedBatch"]:
        """Cuts the batch into `parts` equal groups of rows; concatenated, their scored positions are the batch's.

        The last group takes the padding. Waits for the device once, unless there is only one part.
        """
        if parts == 1:
            return [self]
        rows, length = self.x0.shape
        size = rows // parts
        edges = torch.arange(1, parts, device=self.scored.device) * size * length
        ends = [*torch.searchsorted(self.scored, edges).tolist(), len(self.scored)]
        starts = [0, *ends[:-1]]
        return [
            replace(
                self,
                x0=self.x0[i * size : (i + 1) * size],
                xt=self.xt[i * size : (i + 1) * size],
                scored=self.scored[start:end] - i * size * length,
                weight=self.weight[start:end],
                estimate=None if self.estimate is None else self.estimate[i * size : (i + 1) * size],
            )
            for i, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]


@dataclass(frozen=True, kw_only=True)
class TokenStats:
    """The model's statistics at the scored positions, one entry each."""

    nll: Float[Tensor, "M"]
    """`-log p(x0 | xt)` in nats, with gradient."""
    confidence: Float[Tensor, "M"]
    """Confidence, detached; larger is more confident."""
    top1: Float[Tensor, "M"]
    """Largest probability, detached. Thresholds always test this."""
    statistic: str | None = None
    """Name of the statistic in `confidence` (a key of `reveal.CONFIDENCES`), or None if unknown."""
    estimate: Float[Tensor, "B L D"] | None = None
    """A self-conditioned model's expected embedding at masked positions, 0 elsewhere, if the batch `is_carried`."""

    @staticmethod
    def from_logits(
        logits: Float[Tensor, "M V"], x0: Int[Tensor, "M"], *, confidence: str | None = None
    ) -> "TokenStats":
        """Computes the statistics of `logits`, in fp32 at least. The mask token's logit must be -inf.

        `confidence` is the statistic that the masking process requires, `process.requirements.confidence`; None, if any
        will do, is `prob`.
        """
        confidence = confidence or "prob"
        log_probs = at_least_fp32(logits).log_softmax(dim=-1)
        detached = log_probs.detach()
        top1 = CONFIDENCES["prob"](detached)
        of = choose(CONFIDENCES, "confidence", confidence)
        return TokenStats(
            nll=-log_probs.gather(-1, x0.unsqueeze(-1)).squeeze(-1),
            confidence=top1 if confidence == "prob" else of(detached),
            top1=top1,
            statistic=confidence,
        )

    @staticmethod
    def concatenate(parts: "list[TokenStats]") -> "TokenStats":
        """Joins the statistics of consecutive micro-batches, detached."""
        estimates = [part.estimate for part in parts if part.estimate is not None]
        return TokenStats(
            nll=torch.cat([part.nll.detach() for part in parts]),
            confidence=torch.cat([part.confidence for part in parts]),
            top1=torch.cat([part.top1 for part in parts]),
            statistic=parts[0].statistic,
            estimate=torch.cat(estimates) if estimates else None,
        )


def forbid_tokens(
    logits: Float[Tensor, "M V"], mask_id: int, forbidden: Int[Tensor, "F"] | None = None
) -> Float[Tensor, "M V"]:
    """Sets the logits of the mask token, and of the tokens in `forbidden`, to -inf."""
    token = torch.arange(logits.shape[-1], device=logits.device)
    is_never = token == mask_id
    if forbidden is not None:
        is_never = is_never | torch.isin(token, forbidden)
    return logits.masked_fill(is_never, -torch.inf)


def to_device(value: Tensor, device: torch.device | str) -> Tensor:
    """Copies `value` to `device`, from the CPU to a GPU without waiting for it; float64 only where that exists."""
    device = torch.device(device)
    if value.dtype == torch.float64:
        value = value.to(widest(device))
    # Only a copy from pinned memory is asynchronous.
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


class AsyncCopy:
    """A copy of a tensor on its way to the CPU, which waits only for what the device was asked before it set out."""

    def __init__(self, value: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._value = value
        if value.device.type == "cuda":
            self._value = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> Tensor:
        """Returns the tensor when it has come."""
        if self._event is not None:
            self._event.synchronize()
        return self._value


@dataclass(frozen=True, kw_only=True)
class Query:
    """A decoder's request for the positions of a step: the confidence to compute and how to choose values."""

    confidence: str = "prob"
    """A key of `reveal.CONFIDENCES`."""
    perturb: Callable[[Float[Tensor, "m C"], Int[Tensor, "m"], Int[Tensor, "C"]], Float[Tensor, "m C"]] | None = None
    """`(logits, rows, tokens) -> scores`: the token of the largest score is chosen; None: of the largest logit.

    `rows` and `tokens` say which of the M positions and of the V tokens these are: some at a time, or all.
    """
    draw: Callable[[Float[Tensor, "m V"], Int[Tensor, "m"]], Int[Tensor, "m"]] | None = None
    """`(logits, rows) -> values`, in place of `perturb`: a choice that must see all tokens of a position at once."""
    forbidden: Int[Tensor, "F"] | None = None
    """Tokens that have probability 0, as the mask has."""
    given: Int[Tensor, "M"] | None = None
    """Tokens that are chosen whatever the model says, so that `log_prob` is theirs; the mask: none is given there."""
    has_entropy: bool = False
    """True if the entropy is wanted beside the confidence."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A model's answer to a `Query`, one entry per position.

    Confidence, `top1` and entropy are those of the model's own distribution, however a token is chosen from it.
    """

    likeliest: Int[Tensor, "M"]
    values: Int[Tensor, "M"]
    """The chosen ones: the likeliest, unless the logits were perturbed or tokens given."""
    log_prob: Float[Tensor, "M"]
    """Log-probability of the chosen values."""
    confidence: Float[Tensor, "M"]
    top1: Float[Tensor, "M"]
    """The largest probability."""
    entropy: Float[Tensor, "M"] | None = None
    """In nats, where it was asked for."""

    @staticmethod
    def from_logits(logits: Float[Tensor, "M V"], query: Query, *, mask_id: int) -> "Prediction":
        """Answers `query` from `logits`; nothing is ever the mask. Computed in fp32 at least."""
        logits = forbid_tokens(at_least_fp32(logits), mask_id, query.forbidden)
        log_probs = logits.log_softmax(dim=-1)
        likeliest = logits.argmax(dim=-1)
        values = likeliest
        if query.perturb is not None:
            rows, tokens = (torch.arange(size, device=logits.device) for size in logits.shape)
            values = query.perturb(logits, rows, tokens).argmax(dim=-1)
        if query.draw is not None:
            values = query.draw(logits, torch.arange(len(logits), device=logits.device))
        if query.given is not None:
            values = torch.where(query.given == mask_id, values, query.given)
        top1 = CONFIDENCES["prob"](log_probs)
        return Prediction(
            likeliest=likeliest,
            values=values,
            log_prob=log_probs.gather(-1, values.unsqueeze(-1)).squeeze(-1),
            confidence=top1 if query.confidence == "prob" else CONFIDENCES[query.confidence](log_probs),
            top1=top1,
            entropy=-CONFIDENCES["neg_entropy"](log_probs) if query.has_entropy else None,
        )


def at_least_fp32(x: Tensor) -> Tensor:
    """Converts `x` to fp32, unless it is in fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Finished canvases."""

    tokens: Int[Tensor, "B L"]
    nfe: Int[Tensor, "B"]
    """Number of forward passes that each row took part in."""
    reveal_step: Int[Tensor, "B L"]
    """Step, from 0, in which each position was revealed; -1 in the prompt."""
