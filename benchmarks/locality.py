"""Interventions on locality, as tasks: does what a density of times gains follow how near information lies?

    python -m unmask train text/uniform_small task.name=benchmarks.locality:PermutedText data.length=128
    python -m unmask train text/uniform_small task.name=benchmarks.locality:Chains data.range=8

Run from the root of the repository. Dimensions: n examples asked for, L positions.
"""

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from unmask import noise
from unmask.data.store import RowStore
from unmask.noise import Purpose
from unmask.tasks.rows import TokensData
from unmask.tasks.text import Text, TextData
from unmask.tasks.tokens import Tokens
from unmask.types import CleanBatch


class PermutedText(Text):
    """Text whose positions, but the first, are permuted by one map, the same for all rows.

    All that a token tells of another stays; how far apart the two stand says nothing any more.
    """

    class Config(TextData):
        map_seed: int = Field(1, ge=0, description="of the permutation")

    config: Config

    def _read(self, store: RowStore, row: Int[Tensor, "n"]) -> CleanBatch:
        clean = super()._read(store, row)
        place = torch.arange(self.config.length - 1)
        order = noise.permute(place, len(place), self.config.map_seed, Purpose.SPLIT)
        x0 = torch.cat([clean.x0[:, :1], clean.x0[:, 1:][:, order]], dim=1)
        return CleanBatch(x0=x0, prompt_mask=clean.prompt_mask)


class Chains(Tokens):
    """`range` Markov chains of one law, interleaved: token i depends on token i - `range`, on no other before it."""

    class Config(TokensData):
        length: int = Field(128, ge=8)
        vocab_size: int = Field(33, ge=3, description="values and the mask")
        mask_id: int = 32
        eos_id: int | None = None
        range: int = Field(1, ge=1, description="distance of the token that another depends on")
        sharpness: float = Field(3.0, ge=0, description="of the transitions: softmax(sharpness x Gumbel noise)")
        law_seed: int = Field(0, ge=0)

    config: Config

    def transitions(self) -> Float[Tensor, "V V"]:
        """Cumulative probabilities of the next value, of each value."""
        values = torch.arange(self.config.mask_id)
        energy = noise.gumbel(self.config.law_seed, Purpose.GENERATE, values.unsqueeze(1), values)
        return (self.config.sharpness * energy).softmax(dim=1).cumsum(dim=1)

    def draw(self, number: Int[Tensor, "n"], seed: int) -> CleanBatch:
        law, length = self.transitions(), self.config.length
        u = noise.uniform(seed, Purpose.SHUFFLE, number.unsqueeze(1), torch.arange(length))
        x0 = (u * self.config.mask_id).long()  # what begins a chain is uniform
        for i in range(self.config.range, length):
            before = x0[:, i - self.config.range]
            x0[:, i] = (u[:, i].unsqueeze(1) > law[before]).sum(dim=1).clamp(max=self.config.mask_id - 1)
        return CleanBatch(x0=x0, prompt_mask=torch.zeros_like(x0, dtype=torch.bool))

    def train_stream(self, seed: int) -> "ChainStream":
        return ChainStream(self, seed)

    def validation(self, limit: int) -> CleanBatch:
        return self.draw(torch.arange(limit), noise.integer(self.config.seed, Purpose.EVALUATE))


class ChainStream:
    """Examples without end."""

    epoch_size = 1_000_000

    def __init__(self, task: Chains, seed: int) -> None:
        self._task, self._seed = task, seed

    def __getitem__(self, number: Int[Tensor, "n"]) -> CleanBatch:
        return self._task.draw(number, self._seed)
