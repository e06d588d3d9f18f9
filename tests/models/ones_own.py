"""A model such as a user may bring: a buffer of integers before all weights, and a matrix with two names."""

from typing import Any

import torch
from torch import Tensor, nn

from unmask.config.settings import Section
from unmask.types import TokenSpec


class Tied(nn.Module):
    class Config(Section):
        name: str
        width: int = 8

    @classmethod
    def from_config(cls, config: Any, tokens: TokenSpec) -> "Tied":
        return cls(config.width, tokens)

    def __init__(self, width: int, tokens: TokenSpec) -> None:
        super().__init__()
        self.register_buffer("arange", torch.arange(tokens.length))
        self.embedding = nn.Embedding(tokens.vocab_size, width)
        self.places = nn.Embedding(tokens.length, width)
        self.head = nn.Linear(width, tokens.vocab_size, bias=False)
        self.head.weight = self.embedding.weight

    @property
    def head_weight(self) -> Tensor:
        return self.head.weight

    def forward(self, xt: Tensor, at: Tensor) -> Tensor:
        hidden = self.embedding(xt) + self.places(self.arange)
        return (hidden + hidden.mean(dim=1, keepdim=True)).flatten(0, 1)[at]
