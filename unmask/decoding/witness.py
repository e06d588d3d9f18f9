"""What a model says while a decoder asks it.

Dimensions: B rows, b rows that are still open, L positions, M positions asked for.
"""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmask.decoding.decoder import Decoder
from unmask.decoding.reading import Anew, Blocks, Reader
from unmask.types import Ask, Decoded, Prediction


@dataclass(frozen=True)
class Said:
    """What a model says of the open rows of canvases: the likeliest tokens where asked, and their probabilities."""

    rows: Int[Tensor, "b"]
    xt: Int[Tensor, "b L"]
    at: Int[Tensor, "M"]
    guess: Int[Tensor, "M"]
    top1: Float[Tensor, "M"]


@dataclass
class Witness:
    """Decodes, and keeps what the model said, step by step."""

    decoder: Decoder
    said: list[Said] = field(default_factory=list)

    def decode(self, xt: Int[Tensor, "B L"], prompt: Int[Tensor, "B"] | None = None) -> Decoded:
        return replace(self.decoder, reading=self._reading).decode(xt, prompt)

    def _reading(self, xt: Int[Tensor, "B L"]) -> Reader:
        reading = self.decoder.reading
        reader = Anew(self.decoder.predict) if reading is None else reading(xt)
        return _Overheard(reader, torch.arange(len(xt), device=xt.device), self.said)


@dataclass
class _Overheard:
    """A reader whose answers are written down."""

    reader: Reader
    rows: Int[Tensor, "b"]
    said: list[Said]

    def __call__(self, xt: Int[Tensor, "b L"], at: Int[Tensor, "M"], ask: Ask, blocks: Blocks) -> Prediction:
        answer = self.reader(xt, at, ask, blocks)
        self.said.append(Said(*(part.cpu() for part in (self.rows, xt, at, answer.likeliest, answer.top1))))
        return answer

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        self.rows = self.rows[rows]
        self.reader.keep(rows)
