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
from unmask.decoding.windows import Blocks, NoCache, Predictor, Reader, Reading
from unmask.errors import UserError, choose
from unmask.noise import Purpose
from unmask.reveal import ORDERS, Fixed, RevealRule, RevealState
from unmask.types import Decoded, Prediction, Query


def predictor_from_logits(model: Callable[[Tensor], Tensor], mask_id: int) -> Predictor:
    """A predictor around any callable from tokens (B, L) to logits (B, L, V), such as a module of your own.

    A module with dropout must be in eval mode. One that gives more than logits: `lambda xt: model(xt).logits`.
    """

    def predict(xt: Int[Tensor, "B L"], at: Int[Tensor, "M"], ask: Query) -> Prediction:
        logits = model(xt)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"the model gave {shape}; give logits, a tensor (B, L, V)")
        return Prediction.from_logits(logits.flatten(0, 1).index_select(0, at), ask, mask_id=mask_id)

    return predict


@dataclass
class _Rows:
    """What is known of rows while they are decoded; `keep` leaves those that are still open."""

    number: Int[Tensor, "b"]
    """Which of the B rows these are."""
    prompt: Int[Tensor, "b"]
    xt: Int[Tensor, "b L"]
    step: Int[Tensor, "b"]
    num_masked_at_start: Int[Tensor, "b"]
    last_given: Int[Tensor, "b"]
    """The last position that was given; -1 where none was."""
    is_given: Bool[Tensor, "b L"]
    confidence: Float[Tensor, "b L"]
    """Of each revealed position, when it was revealed."""

    @staticmethod
    def of(xt: Int[Tensor, "B L"], prompt: Int[Tensor, "B"] | None, mask_id: int) -> "_Rows":
        number = torch.arange(len(xt), device=xt.device)
        is_given = xt != mask_id
        position = torch.arange(xt.shape[1], device=xt.device)
        return _Rows(
            number=number,
            prompt=number if prompt is None else prompt,
            xt=xt.clone(),
            step=torch.zeros_like(number),
            num_masked_at_start=(~is_given).sum(dim=-1),
            last_given=torch.where(is_given, position, -1).amax(dim=-1),
            is_given=is_given,
            confidence=torch.zeros(xt.shape, dtype=torch.float64, device=xt.device),
        )

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        for name, value in vars(self).items():
            setattr(self, name, value[rows])


@dataclass(frozen=True)
class Decoder:
    """Fills in masked positions with the model's predictions.

    The result of a row does not depend on what else is in its batch: noise is keyed by (seed, the row's `prompt`
    number, step, position), equal scores go to the lower position, and every row has its own steps and block.

    Args:
        predict: the model.
        mask_id: the mask token.
        order: what is revealed first: a key of `reveal.ORDERS`. `random` is the vanilla sampler of masked diffusion.
        rule: how much is revealed in a step.
        sampling: how values are chosen, and the seed of all noise.
        confidence_noise: coefficient of Gumbel noise on the confidence in nats, times the share of the row's masked
            positions that still are (MaskGIT, 2202.04200; 0.5 in 2502.06768, appendix D.2).
        block_size: S; rows are decoded block by block, from the first that has something masked; None: all at once.
        eos_id: for canvases that are padded with it: what follows the first end token of an answer is filled in at
            once. Not where something is given after it.
        remasking: masks again what was revealed; None: what is revealed stays.
        reading: how the model reads canvases that are being filled in; None: all of them in every step, by `predict`.
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
    reading: Reading | None = None

    def __post_init__(self) -> None:
        choose(ORDERS, "order", self.order)

    def decode(self, xt: Int[Tensor, "B L"], prompt: Int[Tensor, "B"] | None = None) -> Decoded:
        """Finishes the canvases `xt`. `prompt` numbers the rows for the noise; 0, 1, .. unless given."""
        return deque(self.steps(xt, prompt), maxlen=1).pop()

    @torch.no_grad()
    def steps(self, xt: Int[Tensor, "B L"], prompt: Int[Tensor, "B"] | None = None) -> Iterator[Decoded]:
        """The canvases before the first step and after each one, what is masked still holding `mask_id`.

        The tensors are the decoder's own: the next step changes them.
        """
        xt = xt.long()
        rows = _Rows.of(xt, prompt, self.mask_id)
        done = Decoded(tokens=rows.xt.clone(), nfe=rows.step.clone(), reveal_step=torch.full_like(xt, -1))
        reader = NoCache(self.predict) if self.reading is None else self.reading(xt)
        yield done
        before = torch.full_like(rows.number, xt.shape[1] + 1)
        while True:
            left = (rows.xt == self.mask_id).sum(dim=-1)
            are_open, is_stuck = torch.stack([(left > 0).all(), (left >= before).any()]).tolist()
            if is_stuck and self.remasking is None:
                raise UserError("a step filled in nothing: the rule revealed no position, or the mask was written")
            if not are_open:
                still = (left > 0).nonzero().squeeze(1)
                rows.keep(still)
                reader.keep(still)
                left = left[still]
            if not len(rows.number):
                return
            before = left
            is_new = self._step(rows, reader)
            step = done.reveal_step[rows.number].masked_fill(rows.xt == self.mask_id, -1)
            done.reveal_step[rows.number] = torch.where(is_new, rows.step.unsqueeze(1), step)
            rows.step += 1
            done.tokens[rows.number] = rows.xt
            done.nfe[rows.number] = rows.step
            yield done

    def _step(self, rows: _Rows, reader: Reader) -> Bool[Tensor, "b L"]:
        """One forward pass for rows that all have something masked; returns what it revealed."""
        is_masked = rows.xt == self.mask_id
        blocks = self._blocks(is_masked)
        position = torch.arange(rows.xt.shape[1], device=rows.xt.device)
        is_in_block = (position >= blocks.start.unsqueeze(1)) & (position < blocks.stop.unsqueeze(1))
        eligible = is_masked & is_in_block
        is_asked = eligible
        if self.remasking is not None and self.remasking.reads_revealed:
            is_asked = ~rows.is_given & is_in_block
        answer = self._ask(rows, reader, is_asked, blocks)
        state = self._state(rows, answer, is_asked, eligible)
        if self.remasking is None:
            is_new, is_again = self.rule(state), torch.zeros_like(is_masked)
        else:
            is_new, is_again = self.remasking(state, self._revealed(rows, answer, is_asked, is_masked), self.rule)
        values = rows.xt.masked_scatter(is_asked, answer.values)
        rows.xt = torch.where(is_new, values, rows.xt).masked_fill(is_again, self.mask_id)
        rows.confidence = torch.where(is_new, state.top1.double(), rows.confidence)
        return is_new | self._finish(rows)

    def _blocks(self, is_masked: Bool[Tensor, "b L"]) -> Blocks:
        """The first block of each row that has something masked."""
        length = is_masked.shape[1]
        size = self.block_size or length
        start = is_masked.long().argmax(dim=-1) // size * size
        return Blocks(start, (start + size).clamp(max=length))

    def _ask(self, rows: _Rows, reader: Reader, is_asked: Bool[Tensor, "b L"], blocks: Blocks) -> Prediction:
        at = is_asked.flatten().nonzero().squeeze(1)
        row, position = at // rows.xt.shape[1], at % rows.xt.shape[1]
        ask = self.sampling.ask(
            rows.prompt[row],
            rows.step[row],
            position,
            confidence=ORDERS[self.order].confidence,
            has_entropy=getattr(self.rule, "needs_entropy", False),
            given=rows.xt.flatten()[at] if self.remasking is not None else None,
        )
        return reader(rows.xt, at, ask, blocks)

    def _state(
        self, rows: _Rows, answer: Prediction, is_asked: Bool[Tensor, "b L"], eligible: Bool[Tensor, "b L"]
    ) -> RevealState:
        return RevealState(
            score=self._scores(rows, _dense(answer.confidence, is_asked)),
            eligible=eligible,
            top1=_dense(answer.top1, is_asked),
            entropy=None if answer.entropy is None else _dense(answer.entropy, is_asked),
            step=rows.step,
            num_masked=(rows.xt == self.mask_id).sum(dim=-1),
            num_masked_at_start=rows.num_masked_at_start,
        )

    def _scores(self, rows: _Rows, confidence: Float[Tensor, "b L"]) -> Float[Tensor, "b L"]:
        keys = self._keys(rows)
        order = ORDERS[self.order]
        score = order.score(confidence, lambda: noise.uniform(self.sampling.seed, Purpose.ORDER, *keys))
        if not self.confidence_noise:
            return score
        share = (rows.xt == self.mask_id).sum(dim=-1) / rows.num_masked_at_start.double()
        gumbel = noise.gumbel(self.sampling.seed, Purpose.CONFIDENCE, *keys)
        return order.noisy(score, gumbel, self.confidence_noise * share.unsqueeze(1))

    def _keys(self, rows: _Rows) -> tuple[Int[Tensor, "..."], ...]:
        position = torch.arange(rows.xt.shape[1], device=rows.xt.device)
        return rows.prompt.unsqueeze(1), rows.step.unsqueeze(1), position

    def _revealed(
        self, rows: _Rows, answer: Prediction, is_asked: Bool[Tensor, "b L"], is_masked: Bool[Tensor, "b L"]
    ) -> Revealed:
        return Revealed(
            is_revealed=~is_masked & ~rows.is_given,
            confidence=rows.confidence,
            log_prob=_dense(answer.log_prob, is_asked),
            uniform=lambda: noise.uniform(self.sampling.seed, Purpose.REMASK, *self._keys(rows)),
        )

    def _finish(self, rows: _Rows) -> Bool[Tensor, "b L"]:
        """Fills in what follows the first end token of each row; returns where."""
        if self.eos_id is None:
            return torch.zeros_like(rows.is_given)
        position = torch.arange(rows.xt.shape[1], device=rows.xt.device)
        is_end = (rows.xt == self.eos_id) & (position > rows.last_given.unsqueeze(1))
        is_after = is_end.cumsum(dim=-1) > 0
        is_left = is_after & (rows.xt == self.mask_id)
        rows.xt = rows.xt.masked_fill(is_left, self.eos_id)
        return is_left


def _dense(values: Float[Tensor, "M"], is_asked: Bool[Tensor, "b L"]) -> Float[Tensor, "b L"]:
    """`values` where they were asked for, `-inf` elsewhere."""
    return values.new_full(is_asked.shape, -torch.inf).masked_scatter(is_asked, values)
