"""Held-out examples being solved: what was believed at every step, and what was revealed.

Dimensions: B rows, L positions, M masked positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmask.config import DecodeConfig
from unmask.decoding.decoder import Decoder, Predictor
from unmask.models.precision import autocast
from unmask.tasks.task import GradedTask, Task
from unmask.types import Ask, CleanBatch, Prediction


@dataclass(frozen=True)
class Said:
    """What a model says of canvases, at their masked positions: the likeliest tokens, and their probabilities."""

    xt: Int[Tensor, "B L"]
    at: Int[Tensor, "M"]
    guess: Int[Tensor, "M"]
    top1: Float[Tensor, "M"]


@dataclass
class Witness:
    """A predictor that keeps what it said, pass by pass."""

    predict: Predictor
    said: list[Said] = field(default_factory=list)

    def __call__(self, xt: Int[Tensor, "B L"], at: Int[Tensor, "M"], ask: Ask) -> Prediction:
        answer = self.predict(xt, at, ask)
        self.said.append(Said(xt.cpu(), at.cpu(), answer.likeliest.cpu(), answer.top1.cpu()))
        return answer


def traces(
    predict: Predictor, task: Task, examples: CleanBatch, config: DecodeConfig, *, dtype: str, device: torch.device
) -> Iterator[dict[str, Any]]:
    """For each example: `tokens`, the finished canvas, whether it `is_solved` (None: no answer can be), its `steps`.

    A step holds the masked positions (`at`), the likeliest token of each (`guess`) with its probability in percent
    (`sure`), and what was `revealed`.
    """
    for number in range(len(examples)):
        example = examples[number : number + 1]
        witness = Witness(predict)
        decoder = Decoder.from_config(config, witness, task.tokens.mask_id)
        with autocast(dtype, device):
            prompt = torch.tensor([number], device=device)
            decoded = decoder.decode(example.masked(task.tokens.mask_id).to(device), prompt)
        tokens, reveal_step = decoded.tokens.cpu(), decoded.reveal_step[0].cpu()
        yield {
            "tokens": tokens[0].tolist(),
            "is_solved": _is_solved(task, example, tokens),
            "steps": [
                {
                    "at": said.at.tolist(),
                    "guess": said.guess.tolist(),
                    "sure": (100 * said.top1).round().int().tolist(),
                    "revealed": (reveal_step == step).nonzero().squeeze(1).tolist(),
                }
                for step, said in enumerate(witness.said)
            ],
        }


def _is_solved(task: Task, example: CleanBatch, tokens: Int[Tensor, "1 L"]) -> bool | None:
    return bool(task.grade(example, tokens).measures["accuracy"][0]) if isinstance(task, GradedTask) else None
