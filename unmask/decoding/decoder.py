"""Decoding: predict, choose positions by the reveal rule, write their values, until nothing is masked.

Dimensions: B rows, b rows that are still open, L positions, M positions asked for, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask import noise
from unmask.decoding.remasking import Remasking, Revealed
from unmask.decoding.sampling import Sampling
from unmask.decoding.windows import Blocks, NoCache, OpenReader, Predictor, Reader
from unmask.errors import NOT_FINITE_FIX, NotFinite, UserError, choose
from unmask.models.precision import casts_kept
from unmask.noise import Purpose
from unmask.reveal import ORDERS, Fixed, RevealRule, RevealState
from unmask.types import Decoded, Prediction, Query


def predictor_from_logits(model: Callable[[Tensor], Tensor], mask_id: int) -> Predictor:
    """Wraps any callable from tokens (B, L) to logits (B, L, V), such as a module of your own, as a predictor.

    A module with dropout must be in eval mode. One that gives more than logits: `lambda xt: model(xt).logits`.
    """

    def predict(xt: Int[Tensor, "B L"], at: Int[Tensor, "M"], query: Query) -> Prediction:
        logits = model(xt)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"the model gave {shape}; give logits, a tensor (B, L, V)")
        return Prediction.from_logits(logits.flatten(0, 1).index_select(0, at), query, mask_id=mask_id)

    return predict


@dataclass
class _Rows:
    """The state of the rows that are being decoded; `keep` drops those that are finished."""

    number: Int[Tensor, "b"]
    """Indices of these rows among the B that decoding started with."""
    key: Int[Tensor, "b"]
    """Numbers that key the noise of these rows."""
    xt: Int[Tensor, "b L"]
    step: Int[Tensor, "b"]
    num_masked: Int[Tensor, "b"]
    num_masked_at_start: Int[Tensor, "b"]
    last_given: Int[Tensor, "b"]
    """The last position that was given; -1 where none was."""
    is_given: Bool[Tensor, "b L"]
    reveal_step: Int[Tensor, "b L"]
    confidence: Float[Tensor, "b L"]
    """The largest probability at each revealed position, when it was revealed; kept for remasking alone."""
    log_prob: Float[Tensor, "b L"]
    """Log-probability of each revealed token, when it was revealed; kept for remasking alone."""

    @staticmethod
    def of(xt: Int[Tensor, "B L"], key: Int[Tensor, "B"] | None, mask_id: int) -> "_Rows":
        number = torch.arange(len(xt), device=xt.device)
        is_given = xt != mask_id
        position = torch.arange(xt.shape[1], device=xt.device)
        num_masked = (~is_given).sum(dim=-1)
        return _Rows(
            number=number,
            key=number if key is None else key,
            xt=xt.clone(),
            step=torch.zeros_like(number),
            num_masked=num_masked,
            num_masked_at_start=num_masked,
            last_given=torch.where(is_given, position, -1).amax(dim=-1),
            is_given=is_given,
            reveal_step=torch.full_like(xt, -1),
            confidence=torch.zeros(xt.shape, dtype=noise.widest(xt.device), device=xt.device),
            log_prob=torch.zeros(xt.shape, dtype=noise.widest(xt.device), device=xt.device),
        )

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        for name, value in vars(self).items():
            setattr(self, name, value[rows])


@dataclass(frozen=True)
class _Span:
    """The W positions of each row that a step looks at: its block, or all where any may be masked again."""

    blocks: Blocks
    position: Int[Tensor, "b W"]
    tokens: Int[Tensor, "b W"]
    eligible: Bool[Tensor, "b W"]
    """Masked, and in the row's block."""
    is_asked: Bool[Tensor, "b W"]
    is_revealed: Bool[Tensor, "b W"]

    def to_dense(self, values: Float[Tensor, "M"]) -> Float[Tensor, "b W"]:
        """Returns `values` where the model was asked, `-inf` elsewhere."""
        return values.new_full(self.is_asked.shape, -torch.inf).masked_scatter(self.is_asked, values)


@dataclass(frozen=True)
class Decoder:
    """Fills in masked positions with the model's predictions.

    The result of a row does not depend on what else is in its batch: noise is keyed by (seed, the row's
    `key`, step, position), equal scores go to the lower position, and every row has its own steps and block.

    Args:
        predict: the model.
        mask_id: the mask token.
        order: what is revealed first: a key of `reveal.ORDERS`. `random` is the vanilla sampler of masked diffusion.
        rule: how much is revealed in a step.
        sampling: how values are chosen, and the seed of all noise.
        confidence_noise: coefficient of Gumbel noise on the confidence in nats, times the share of the row's masked
            positions that still are (MaskGIT, 2202.04200; 0.5 in 2502.06768, appendix D.2).
        block_size: S; rows are decoded block by block, from the first that has something masked; default: all at once.
        eos_id: for canvases that are padded with it: what follows the first end token of an answer is filled in at
            once. Not where something is given after it.
        remasking: masks again what was revealed; default: what is revealed stays.
        open_reader: makes what reads the canvases, step after step; default: `predict` reads all of them in every step.
    """

    predict: Predictor
    mask_id: int
    order: str = "prob"
    rule: RevealRule = field(default_factory=lambda: Fixed(1))
    sampling: Sampling = field(default_factory=Sampling)
    confidence_noise: float = 0.0
    block_size: int | None = None
    eos_id: int | None = None
    remasking: Remasking | None = None
    open_reader: OpenReader | None = None

    def __post_init__(self) -> None:
        choose(ORDERS, "order", self.order)

    def decode(self, xt: Int[Tensor, "B L"], key: Int[Tensor, "B"] | None = None) -> Decoded:
        """Fills in the canvases `xt`. The noise of a row depends on its `key`; default: 0, 1, .."""
        with casts_kept():
            return deque(self.steps(xt, key), maxlen=1).pop()

    def open(self, xt: Int[Tensor, "B L"]) -> Reader:
        """Opens the reader of the canvases `xt`, before their first step."""
        return NoCache(self.predict) if self.open_reader is None else self.open_reader(xt)

    @torch.no_grad()
    def steps(self, xt: Int[Tensor, "B L"], key: Int[Tensor, "B"] | None = None) -> Iterator[Decoded]:
        """Yields the canvases before the first step and after each one; what is masked still holds `mask_id`.

        The tensors are the decoder's own: the next step changes them.

        Raises:
            NotFinite: the model gives nan.
            UserError: a step filled in nothing.
        """
        xt = xt.long()
        rows = _Rows.of(xt, key, self.mask_id)
        done = Decoded(tokens=rows.xt.clone(), nfe=rows.step.clone(), reveal_step=rows.reveal_step.clone())
        reader = self.open(xt)
        before = torch.full_like(rows.number, xt.shape[1] + 1)
        is_bad = torch.zeros_like(rows.is_given)
        while True:
            left = rows.num_masked
            # One question a step: the device is waited for once.
            are_open, is_stuck, has_bad = torch.stack([(left > 0).all(), (left >= before).any(), is_bad.any()]).tolist()
            if has_bad:
                row, place = is_bad.nonzero()[0].tolist()
                raise NotFinite(
                    f"the model gives nan at position {place} of canvas {int(rows.number[row])}, in step "
                    f"{int(rows.step[row])}: {NOT_FINITE_FIX}"
                )
            if is_stuck and self.remasking is None:
                raise UserError("a step filled in nothing: the rule revealed no position, or the mask was written")
            yield done
            if not are_open:
                still = (left > 0).nonzero().squeeze(1)
                rows.keep(still)
                reader.keep(still)
            if not len(rows.number):
                return
            before = rows.num_masked
            is_bad = self._step(rows, reader)
            done.tokens[rows.number] = rows.xt
            done.nfe[rows.number] = rows.step
            done.reveal_step[rows.number] = rows.reveal_step

    def _step(self, rows: _Rows, reader: Reader) -> Bool[Tensor, "b L"]:
        """Takes rows that all have something masked one forward pass further; True where the model gave nan."""
        span = self._span(rows)
        answer = self._query(rows, span, reader)
        state = self._state(rows, span, answer)
        if self.remasking is None:
            is_new, is_again = self.rule(state), None
        else:
            is_new, is_again = self.remasking(state, self._revealed(rows, span, answer), self.rule)
        tokens = torch.where(is_new, span.tokens.masked_scatter(span.is_asked, answer.values), span.tokens)
        reveal_step = torch.where(is_new, rows.step.unsqueeze(1), rows.reveal_step.gather(1, span.position))
        if is_again is not None:
            tokens, reveal_step = tokens.masked_fill(is_again, self.mask_id), reveal_step.masked_fill(is_again, -1)
            rows.confidence = torch.where(is_new, noise.wide(state.top1), rows.confidence)
            rows.log_prob = torch.where(is_new, noise.wide(span.to_dense(answer.log_prob)), rows.log_prob)
        rows.xt = rows.xt.scatter(1, span.position, tokens)
        rows.reveal_step = rows.reveal_step.scatter(1, span.position, reveal_step)
        if self.eos_id is not None:
            self._pad(rows, self.eos_id)
        rows.num_masked = (rows.xt == self.mask_id).sum(dim=-1)
        rows.step += 1
        return torch.zeros_like(rows.is_given).scatter_(1, span.position, state.top1.isnan())

    def _span(self, rows: _Rows) -> _Span:
        length = rows.xt.shape[1]
        blocks = self._blocks(rows.xt == self.mask_id)
        width = length if self.remasking is not None else min(self.block_size or length, length)
        first = blocks.start.clamp(max=length - width)  # the last block may be shorter
        position = first.unsqueeze(1) + torch.arange(width, device=first.device)
        tokens = rows.xt.gather(1, position)
        is_masked = tokens == self.mask_id
        is_in_block = (position >= blocks.start.unsqueeze(1)) & (position < blocks.stop.unsqueeze(1))
        is_given = rows.is_given.gather(1, position)
        eligible = is_masked & is_in_block
        reads_revealed = self.remasking is not None and self.remasking.reads_revealed
        return _Span(
            blocks=blocks,
            position=position,
            tokens=tokens,
            eligible=eligible,
            is_asked=~is_given & is_in_block if reads_revealed else eligible,
            is_revealed=~is_masked & ~is_given,
        )

    def _blocks(self, is_masked: Bool[Tensor, "b L"]) -> Blocks:
        """Returns the first block of each row that has something masked."""
        length = is_masked.shape[1]
        size = self.block_size or length
        start = is_masked.byte().argmax(dim=-1) // size * size
        return Blocks(start, (start + size).clamp(max=length), size if length % size == 0 else None)

    def _query(self, rows: _Rows, span: _Span, reader: Reader) -> Prediction:
        width = span.position.shape[1]
        if width == 1:  # nothing else can be asked for: the device need not be waited for
            place = torch.arange(len(rows.xt), device=rows.xt.device)
        else:
            place = span.is_asked.flatten().nonzero().squeeze(1)
        row, position = place // width, span.position.flatten()[place]
        query = self.sampling.query(
            rows.key[row],
            rows.step[row],
            position,
            confidence=ORDERS[self.order].confidence,
            has_entropy=getattr(self.rule, "needs_entropy", False),
            given=span.tokens.flatten()[place] if self.remasking is not None else None,
        )
        return reader(rows.xt, row * rows.xt.shape[1] + position, query, span.blocks)

    def _state(self, rows: _Rows, span: _Span, answer: Prediction) -> RevealState:
        return RevealState(
            score=self._scores(rows, span, span.to_dense(answer.confidence)),
            eligible=span.eligible,
            top1=span.to_dense(answer.top1),
            entropy=None if answer.entropy is None else span.to_dense(answer.entropy),
            step=rows.step,
            num_masked=rows.num_masked,
            num_masked_at_start=rows.num_masked_at_start,
        )

    def _scores(self, rows: _Rows, span: _Span, confidence: Float[Tensor, "b W"]) -> Float[Tensor, "b W"]:
        keys = (rows.key.unsqueeze(1), rows.step.unsqueeze(1), span.position)
        order = ORDERS[self.order]
        score = order.score(confidence, lambda: noise.uniform(self.sampling.seed, Purpose.ORDER, *keys))
        if not self.confidence_noise:
            return score
        share = rows.num_masked / noise.wide(rows.num_masked_at_start)
        gumbel = noise.gumbel(self.sampling.seed, Purpose.CONFIDENCE, *keys)
        return order.noisy(score, gumbel, self.confidence_noise * share.unsqueeze(1))

    def _revealed(self, rows: _Rows, span: _Span, answer: Prediction) -> Revealed:
        keys = (rows.key.unsqueeze(1), rows.step.unsqueeze(1), span.position)
        log_prob = span.to_dense(answer.log_prob)
        return Revealed(
            is_revealed=span.is_revealed,
            confidence=rows.confidence,
            log_prob=torch.where(span.is_asked, log_prob, rows.log_prob.to(log_prob.dtype)),
            uniform=lambda: noise.uniform(self.sampling.seed, Purpose.REMASK, *keys),
        )

    def _pad(self, rows: _Rows, eos_id: int) -> None:
        """Fills in what follows the first end token of each row's answer."""
        position = torch.arange(rows.xt.shape[1], device=rows.xt.device)
        is_end = (rows.xt == eos_id) & (position > rows.last_given.unsqueeze(1))
        end = torch.where(is_end, position, rows.xt.shape[1]).amin(dim=-1)
        is_left = (rows.xt == self.mask_id) & (position > end.unsqueeze(1))
        rows.xt = rows.xt.masked_fill(is_left, eos_id)
        rows.reveal_step = torch.where(is_left, rows.step.unsqueeze(1), rows.reveal_step)
