"""A distribution small enough to enumerate: every expectation has an exact value to test against.

Dimensions: V values, L positions, S = V^L sequences, B rows, M positions asked for.
"""

from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from rich.text import Text
from torch import Tensor

from unmask import noise
from unmask.config.settings import Section
from unmask.errors import UserError
from unmask.machine import require_memory
from unmask.noise import Purpose
from unmask.tasks.task import DisplayLayout, Grades
from unmask.types import CleanBatch, TokenSpec


class ToyData(Section):
    """The settings of `Toy`."""

    values: int = Field(3, ge=2, le=9, description="that a position may have")
    length: int = Field(4, ge=1, le=8, description="positions of a sequence")
    prompt_length: int = Field(0, ge=0, description="leading positions that are given")
    sharpness: float = Field(2.0, ge=0, description="0 = all sequences equally likely")
    seed: int = Field(0, ge=0, description="of the probabilities")


class Toy:
    """Sequences of `length` values with the joint distribution softmax(sharpness x Gumbel noise), fixed by `seed`."""

    Config = ToyData

    def __init__(self, config: ToyData) -> None:
        self.config = config
        self.tokens = TokenSpec(vocab_size=config.values + 1, length=config.length, mask_id=config.values)
        self.canvas = DisplayLayout(columns=config.length)
        count = config.values**config.length
        require_memory(count * (64 + 16 * config.length), f"data.values={config.values}", "take a smaller data.length")
        self.sequences = torch.tensor(list(product(range(config.values), repeat=config.length)))  # (S, L)
        self.probabilities = self._joint()  # (S,), fp64

    @classmethod
    def from_config(cls, config: ToyData) -> "Toy":
        if config.prompt_length >= config.length:
            raise UserError(f"data.prompt_length={config.prompt_length}: leaves nothing of data.length={config.length}")
        return cls(config)

    def _joint(self) -> Float[Tensor, "S"]:
        number = torch.arange(len(self.sequences))
        energy = noise.gumbel(self.config.seed, Purpose.GENERATE, number)
        return (self.config.sharpness * energy).softmax(dim=0)

    def posterior(self, xt: Int[Tensor, "B L"], at: Int[Tensor, "M"]) -> Float[Tensor, "M V1"]:
        """Computes `log p(x0[i] | xt)` exactly at flat positions, as logits; -inf for the mask token."""
        is_compatible = ((xt.unsqueeze(1) == self.sequences) | (xt == self.tokens.mask_id).unsqueeze(1)).all(dim=-1)
        mass = is_compatible * self.probabilities  # (B, S)
        value = torch.nn.functional.one_hot(self.sequences, self.tokens.vocab_size).double()  # (S, L, V + 1)
        p = torch.einsum("bs,slv->blv", mass, value) / mass.sum(dim=-1)[:, None, None]
        return p.flatten(0, 1)[at].log()

    def train_stream(self, seed: int) -> "ToyStream":
        return ToyStream(self, seed)

    def synthetic_stream(self, seed: int) -> "ToyStream":
        return self.train_stream(seed)

    def validation(self, limit: int) -> CleanBatch:
        require_memory(limit * self.config.length * 9, f"{limit} examples", "take fewer")
        u = (torch.arange(limit).double() + 0.5) / limit
        return self.draw(u)

    def draw(self, u: Float[Tensor, "B"]) -> CleanBatch:
        """Draws sequences by inverse transform of the uniform numbers `u`."""
        index = torch.searchsorted(self.probabilities.cumsum(0), u).clamp(max=len(self.sequences) - 1)
        x0 = self.sequences[index]
        prompt_mask = torch.arange(self.config.length) < self.config.prompt_length
        return CleanBatch(x0=x0, prompt_mask=prompt_mask.expand(x0.shape).clone())

    def examples_from_file(self, path: Path) -> CleanBatch:
        raise UserError(f"{path}: the toy task has no files; it is a distribution, set by its configuration")

    def prompts(self, lines: Iterable[str], source: str) -> Int[Tensor, "B L"]:
        raise UserError(f"{source}: the toy task has no prompts")

    def grade(self, examples: CleanBatch, tokens: Int[Tensor, "B L"]) -> Grades:
        """Grades `accuracy`: a sequence is right if it is at least as likely as uniform chance."""
        place = self.config.values ** torch.arange(self.config.length - 1, -1, -1)
        p = self.probabilities[(tokens.cpu() * place).sum(dim=-1)]
        return Grades({"accuracy": p >= 1 / len(self.sequences)})

    def record(self, prompt: Int[Tensor, "L"], tokens: Int[Tensor, "L"]) -> dict[str, Any]:
        return {"prompt": prompt.tolist(), "answer": tokens.tolist()}

    def symbol(self, token: int) -> str:
        return str(token)

    def render(self, tokens: Int[Tensor, "L"], is_given: Bool[Tensor, "L"], is_new: Bool[Tensor, "L"]) -> Text:
        return Text(" ".join("·" if token == self.tokens.mask_id else str(token) for token in tokens.tolist()))


class ToyStream:
    """A stream of independent draws; `epoch_size` is the number of sequences, though draws never repeat in order."""

    def __init__(self, toy: Toy, seed: int) -> None:
        self._toy, self._seed = toy, seed

    @property
    def epoch_size(self) -> int:
        return len(self._toy.sequences)

    def __getitem__(self, number: Int[Tensor, "n"]) -> CleanBatch:
        return self._toy.draw(noise.uniform(self._seed, Purpose.SHUFFLE, number))
