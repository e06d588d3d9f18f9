"""The likelihood of a text given what stands before it: log p(continuation | context), for choices and perplexities.

A causal model's is exact. Otherwise it is the bound of `nelbo.py`, of the continuation alone: the context is never
masked. Its masks are drawn with a key, so that all choices of a question get the same ones: of a position, and of the
share that is masked. Then a difference of two choices varies less than either of them.

Dimensions: D draws of a continuation, M different masks among them, L positions of its row, N blocks of S positions.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask import noise
from unmask.blocks import in_blocks, over_positions
from unmask.config.run import EvalConfig
from unmask.errors import UserError, check_finite
from unmask.evaluation.regression import estimate_draws, stratified_stderr
from unmask.masking.process import make_batch
from unmask.masking.time import masked_count
from unmask.masking.uniform import mask_exactly
from unmask.masking.weights import per_masked
from unmask.models.denoiser import Denoiser
from unmask.noise import Purpose
from unmask.types import to_device

NUM_DRAWS: int = EvalConfig().choice_draws
"""Most masks of a continuation, unless settings or options say otherwise."""
_PAD_CAUSAL = 16
"""Rows of a causal model are filled up to multiples of this, which changes no prediction and makes larger batches."""
_TOKENS = 16_384
"""Positions of a batch."""


@dataclass(frozen=True)
class Pair:
    """A continuation and what stands before it, as ids.

    Attributes:
        context: what is given. It may be empty, unless the model reads the prediction of a token from the one before.
        continuation: what is scored: one token or more.
        key: keys the masks. Choices of one question have the same key.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    key: int = 0


@dataclass(frozen=True)
class Score:
    """An estimate of log p(continuation | context).

    Attributes:
        value: in nats. A lower bound, unless the model is causal or the blocks are of one token; of drawn masks an
            unbiased estimate of the bound, which may come out above 0.
        stderr: the standard error over the masks; 0 if none was drawn (one token, a causal model, or all the masks that
            there are), None if it is unknown, of a single draw.
        passes: forward passes over the row: different masks of it.
    """

    value: float
    stderr: float | None
    passes: int


@dataclass(frozen=True)
class PlannedRows:
    """The rows of a pair: clean tokens, the continuation's positions, and different masks with their weights.

    The weighted NLL sums to -log p over all masks; where they are drawn, its mean over the draws estimates that.
    """

    x0: Int[Tensor, "L"]
    eligible: Bool[Tensor, "L"]
    is_masked: Bool[Tensor, "M L"]
    weight: Float[Tensor, "M L"]
    drawn: Int[Tensor, "D"] | None = None


def score_pairs(
    model: Denoiser,
    pairs: Sequence[Pair],
    *,
    length: int,
    draws: int = NUM_DRAWS,
    seed: int = 0,
    update: Callable[[int], None] | None = None,
) -> list[Score]:
    """Scores each pair.

    A continuation of L tokens has 2^L - 1 masks. If these are no more than `draws`, all are taken, and the bound is
    exact (with one token it is the likelihood). Else n is stratified: draw d of D masks n = ceil((d + u) / D x L)
    positions, and a mask that several draws have is read once. A block model's blocks are masked at the same time,
    each given the clean ones before it, and summed: with blocks of one token that is the chain rule, in one pass.

    Args:
        model: the denoiser.
        pairs: what to score. A context that does not fit loses its beginning.
        length: positions of the longest row, those that the model was trained on.
        draws: D, most masks of a continuation.
        seed: keys the masks, with the keys of the pairs: a score depends on nothing else, such as on other pairs.
        update: is called with how many rows are done, of `count_rows`.

    Raises:
        UserError: a continuation does not fit, is empty, or holds the mask; or there is nothing before its first token.
        NotFinite: the model gives numbers that are not finite.
    """
    lengths = [len(_clean_row(model, pair, number, length)[0]) for number, pair in enumerate(pairs)]
    order = sorted(range(len(pairs)), key=lambda number: lengths[number])
    # A plan is made when its turn comes and forgotten when it is scored: together they would not fit in memory.
    rows = (row for number in order for row in _rows(model, pairs[number], number, length, draws, seed))
    scores: dict[int, Score] = {}
    read: list[Tensor] = []  # the rows so far of one pair: a pair's stand together
    done = 0
    for batch in _batches(rows):
        for row, nll in zip(batch, _read(model, batch), strict=True):
            read.append(nll)
            if len(read) == len(row.plan.weight):
                scores[row.number] = _score(row.plan, torch.stack(read), model.block_size)
                read.clear()
        done += len(batch)
        if update is not None:
            update(done)
    return [scores[number] for number in range(len(pairs))]


def greedy_match(predicted: Int[Tensor, "L"], pair: Pair) -> bool:
    """True if a decoded row holds the continuation."""
    start = len(pair.context)
    return predicted[start : start + len(pair.continuation)].tolist() == list(pair.continuation)


def cut_windows(ids: Sequence[int], start: Sequence[int], length: int, key: int = 0) -> list[Pair]:
    """Cuts a text into windows of `length` whose tokens are each predicted once.

    The first window begins with the tokens `start`, every other with the last token of the one before it.

    Args:
        ids: the text.
        start: what stands before every text, such as its start token; perhaps nothing.
        length: positions of a window.
        key: keys the masks of the first window; the others take the numbers after it.
    """
    context, rest, found = tuple(start), list(ids), list[Pair]()
    while rest:
        room = max(1, length - len(context))
        found.append(Pair(context, tuple(rest[:room]), key + len(found)))
        context, rest = (rest[:room][-1],), rest[room:]
    return found


def fit_context(model: Denoiser, pair: Pair, length: int) -> tuple[int, ...]:
    """Returns the end of the context, as much as fits before the continuation in `length` positions.

    Raises:
        ValueError: the continuation cannot be scored.
    """
    size = len(pair.continuation)
    least = int(model.alignment == "next" or model.is_causal)
    if not size:
        raise ValueError("is empty; give at least one token")
    if size + least > length:
        raise ValueError(f"has {size} tokens, and the model reads {length}; shorten it")
    if least and not pair.context:
        raise ValueError("nothing stands before it, and this model predicts a token from the one before")
    context = pair.context[len(pair.context) - min(len(pair.context), length - size) :]
    if model.mask_id in pair.continuation or model.mask_id in context:
        raise ValueError("it, or what stands before it, holds the mask token; leave it out")
    return context


def plan_rows(model: Denoiser, pair: Pair, number: int, length: int, draws: int, seed: int) -> PlannedRows:
    """Plans the rows that `score_pairs` reads for a pair.

    Raises:
        UserError: the continuation, `number` + 1 in messages, cannot be scored.
    """
    x0, start = _clean_row(model, pair, number, length)
    eligible = torch.zeros(len(x0), dtype=torch.bool)
    eligible[start : start + len(pair.continuation)] = True
    if model.is_causal:
        return PlannedRows(x0, eligible, torch.zeros(1, len(x0), dtype=torch.bool), eligible[None].double())
    blocks = in_blocks(eligible[None], 1 if model.block_size is None else len(x0) // model.block_size)
    longest = int(blocks.sum(dim=-1).max())
    if longest < 32 and 2**longest - 1 <= draws:
        return PlannedRows(x0, eligible, *_all_masks(blocks, 2**longest - 1))
    return PlannedRows(x0, eligible, *_draw_masks(blocks, draws, pair.key, seed))


def _clean_row(model: Denoiser, pair: Pair, number: int, length: int) -> tuple[Int[Tensor, "L"], int]:
    """Returns a row without masks, and where the continuation begins in it."""
    try:
        context = fit_context(model, pair, length)
    except ValueError as error:
        raise UserError(f"continuation {number + 1}: {error}") from error
    unit = _PAD_CAUSAL if model.is_causal else model.block_size or 1
    ids = [*context, *pair.continuation]
    # What follows is not known: a block model sees masks there. A causal one never sees it.
    filled = min(-len(ids) % unit, length - len(ids))
    return torch.tensor(ids + [ids[0] if model.is_causal else model.mask_id] * filled), len(context)


def _all_masks(eligible: Bool[Tensor, "1 N S"], number: int) -> tuple[Bool[Tensor, "M L"], Float[Tensor, "M L"]]:
    """Takes every mask of each block: one of n of its L_b positions has the weight 1 / (C(L_b, n) n)."""
    is_masked = torch.zeros(number, *eligible.shape[1:], dtype=torch.bool)
    weight = torch.zeros(is_masked.shape, dtype=torch.float64)
    for block, own in enumerate(eligible[0]):
        place = own.nonzero().squeeze(1)
        for mask in range(1, 2 ** len(place)):
            chosen = place[[bool(mask >> bit & 1) for bit in range(len(place))]]
            is_masked[mask - 1, block, chosen] = True
            weight[mask - 1, block, chosen] = 1 / (math.comb(len(place), len(chosen)) * len(chosen))
    return is_masked.flatten(1), weight.flatten(1)


def _draw_masks(
    eligible: Bool[Tensor, "1 N S"], draws: int, key: int, seed: int
) -> tuple[Bool[Tensor, "M L"], Float[Tensor, "M L"], Int[Tensor, "D"]]:
    """Draws masks, and says which of them each draw has: there is but one of all positions, and few of almost all."""
    blocks = eligible.expand(draws, -1, -1)
    draw = torch.arange(draws)
    seed = noise.integer(seed, Purpose.EVALUATE)
    u = 1 - noise.uniform(seed, Purpose.TIME, key, torch.arange(eligible.shape[1]))  # in (0, 1], of each block
    t = (draw.unsqueeze(1) + u) / draws
    example = noise.bits(seed, Purpose.MASK, key, draw)
    every = mask_exactly(blocks, masked_count(t, blocks.sum(dim=-1)), example, seed)
    is_masked, drawn = every.unique(dim=0, return_inverse=True)
    total = int(eligible.sum())
    length = eligible[0].numel()
    weight = over_positions(per_masked(is_masked, eligible.expand_as(is_masked)) * total, length)
    return is_masked.flatten(1), weight * is_masked.flatten(1), drawn


class _Row(NamedTuple):
    """One mask of the pair `number`."""

    number: int
    plan: PlannedRows
    mask: int


def _rows(model: Denoiser, pair: Pair, number: int, length: int, draws: int, seed: int) -> Iterator[_Row]:
    plan = plan_rows(model, pair, number, length, draws, seed)
    yield from (_Row(number, plan, mask) for mask in range(len(plan.weight)))


def _batches(rows: Iterable[_Row]) -> Iterator[list[_Row]]:
    """Cuts rows into batches of one length; no row of a batch reads another's."""
    for length, alike in groupby(rows, key=lambda row: len(row.plan.x0)):
        while batch := list(islice(alike, max(1, _TOKENS // length))):
            yield batch


@torch.no_grad()
def _read(model: Denoiser, rows: Sequence[_Row]) -> list[Float[Tensor, "L"]]:
    """Returns the NLL at each scored position of each row, and 0 at the others."""
    device = next(model.parameters()).device
    x0 = torch.stack([row.plan.x0 for row in rows]).to(device)
    is_masked = torch.stack([row.plan.is_masked[row.mask] for row in rows]).to(device)
    weight = to_device(torch.stack([row.plan.weight[row.mask] for row in rows]), device)
    batch = make_batch(x0, torch.where(is_masked, model.mask_id, x0), weight > 0, weight)
    nll = batch.scatter(noise.wide(model(batch).nll), 0.0).cpu().double()
    check_finite(nll.sum(dim=-1).tolist(), "the model", "continuation", [row.number for row in rows])
    return [*nll]


def _score(plan: PlannedRows, nll: Float[Tensor, "M L"], block_size: int | None) -> Score:
    """Sums over all masks, or estimates that from those drawn."""
    if plan.drawn is None:
        return Score(-(nll * plan.weight).sum().item(), 0.0, len(nll))
    places = plan.eligible.nonzero().squeeze(1)
    own = plan.drawn[:, None], places
    estimates = estimate_draws(nll[own], plan.is_masked[own], places // (block_size or len(plan.x0)))
    return Score(-estimates.mean().item(), stratified_stderr(estimates), len(nll))


def count_rows(model: Denoiser, pairs: Iterable[Pair], draws: int) -> int:
    """Counts the rows that `score_pairs` reads, at most."""
    longest = 1 if model.is_causal else model.block_size or 30
    return sum(min(draws, 2 ** min(len(pair.continuation), longest, 30) - 1) for pair in pairs)
