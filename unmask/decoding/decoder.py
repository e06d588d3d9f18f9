"""Decoding: predict, choose positions by the reveal rule, write their values, until nothing is masked.

Dimensions: B rows, L positions, M masked positions of the rows that are still open, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask import noise
from unmask.config import DecodeConfig
from unmask.decoding.sampling import Sampling
from unmask.noise import Purpose
from unmask.reveal import ORDERS, Fixed, RevealRule, RevealState, Steps
from unmask.types import Ask, Decoded, Prediction


@runtime_checkable
class Predictor(Protocol):
    """What is asked of the flat positions `at` (M,) of `xt` (B, L). As `Denoiser.predict`."""

    def __call__(self, xt: Int[Tensor, "B L"], at: Int[Tensor, "M"], ask: Ask) -> Prediction: ...


def predictor_from_logits(model: Callable[[Tensor], Tensor], mask_id: int) -> Predictor:
    """A predictor around any callable from tokens (B, L) to logits (B, L, V), such as a module of your own."""

    def predict(xt: Int[Tensor, "B L"], at: Int[Tensor, "M"], ask: Ask) -> Prediction:
        return Prediction.from_logits(model(xt).flatten(0, 1).index_select(0, at), ask, mask_id=mask_id)

    return predict


@dataclass(frozen=True)
class Decoder:
    """Fills in masked positions with the model's predictions.

    The result of a row does not depend on what else is in its batch: noise is keyed by (seed, the row's `prompt`
    number, step, position), and equal scores go to the lower position.

    Args:
        predict: the model.
        mask_id: the mask token.
        order: what is revealed first: a key of `reveal.ORDERS`. `random` is the vanilla sampler of masked diffusion.
        rule: how much is revealed in a step.
        temperature: 0 takes the likeliest value; else values are drawn from softmax(logits / temperature), with Gumbel
            noise in fp64. The confidence is always that of the model's own distribution.
        confidence_noise: coefficient of Gumbel noise that is added to the confidence (0.5 in 2502.06768, appendix D.2).
        seed: of both noises, and of the order `random`.
    """

    predict: Predictor
    mask_id: int
    order: str = "prob"
    rule: RevealRule = field(default_factory=lambda: Fixed(1))
    temperature: float = 0.0
    confidence_noise: float = 0.0
    seed: int = 0

    @staticmethod
    def from_config(config: DecodeConfig, predict: Predictor, mask_id: int) -> "Decoder":
        return Decoder(
            predict,
            mask_id,
            order=config.confidence,
            rule=Steps(config.steps) if config.steps else Fixed(config.tokens_per_step),
            temperature=config.temperature,
            confidence_noise=config.confidence_noise,
            seed=config.seed,
        )

    def decode(self, xt: Int[Tensor, "B L"], prompt: Int[Tensor, "B"] | None = None) -> Decoded:
        """Finishes the canvases `xt`. `prompt` numbers the rows for the noise; 0, 1, .. unless given."""
        return deque(self.steps(xt, prompt), maxlen=1).pop()

    @torch.no_grad()
    def steps(self, xt: Int[Tensor, "B L"], prompt: Int[Tensor, "B"] | None = None) -> Iterator[Decoded]:
        """The canvases before the first step and after each one, what is masked still holding `mask_id`.

        The tensors are the decoder's own: the next step changes them.
        """
        prompt = torch.arange(len(xt), device=xt.device) if prompt is None else prompt
        xt = xt.clone()
        num_at_start = (xt == self.mask_id).sum(dim=-1)
        nfe = torch.zeros(len(xt), dtype=torch.long, device=xt.device)
        reveal_step = torch.full_like(xt, -1)
        yield Decoded(tokens=xt, nfe=nfe, reveal_step=reveal_step)
        while len(open_rows := (xt == self.mask_id).any(dim=-1).nonzero().squeeze(1)):
            step = nfe[open_rows]
            tokens, is_revealed = self._step(xt[open_rows], prompt[open_rows], step, num_at_start[open_rows])
            xt[open_rows] = tokens
            reveal_step[open_rows] = torch.where(is_revealed, step.unsqueeze(1), reveal_step[open_rows])
            nfe[open_rows] += 1
            yield Decoded(tokens=xt, nfe=nfe, reveal_step=reveal_step)

    def _step(
        self, xt: Int[Tensor, "B L"], prompt: Int[Tensor, "B"], step: Int[Tensor, "B"], num_at_start: Int[Tensor, "B"]
    ) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
        """One forward pass for rows that all have something masked."""
        is_masked = xt == self.mask_id
        at = is_masked.flatten().nonzero().squeeze(1)
        keys = (prompt.unsqueeze(1), step.unsqueeze(1), torch.arange(xt.shape[1], device=xt.device))
        row, position = at // xt.shape[1], at % xt.shape[1]
        ask = Sampling(self.temperature, self.seed).ask(
            prompt[row], step[row], position, confidence=ORDERS[self.order].confidence
        )
        answer = self.predict(xt, at, ask)
        state = RevealState(
            score=self._scores(answer.confidence, is_masked, *keys),
            eligible=is_masked,
            top1=answer.top1.new_zeros(xt.shape).masked_scatter(is_masked, answer.top1),
            entropy=None,
            step=step,
            num_masked=is_masked.sum(dim=-1),
            num_masked_at_start=num_at_start,
        )
        is_revealed = self.rule(state)
        values = xt.masked_scatter(is_masked, answer.values)
        return torch.where(is_revealed, values, xt), is_revealed

    def _scores(
        self, confidence: Float[Tensor, "M"], is_masked: Bool[Tensor, "B L"], *keys: Int[Tensor, "..."]
    ) -> Float[Tensor, "B L"]:
        dense = confidence.new_full(is_masked.shape, -torch.inf).masked_scatter(is_masked, confidence)
        score = ORDERS[self.order].score(dense, lambda: noise.uniform(self.seed, Purpose.ORDER, *keys))
        if self.confidence_noise:
            score = score + self.confidence_noise * noise.gumbel(self.seed, Purpose.CONFIDENCE, *keys)
        return score
