"""A task of one's own: digits, and then the same digits in order.

    unmask train debug task.name=examples.sorting:Sorting 'data={length: 5}' train.steps=300 --out runs/sorting
    echo 31415 > digits.txt
    unmask decode runs/sorting digits.txt --trust-code

The protocol is `unmask.tasks.task.GradedTask`.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from rich.text import Text
from torch import Tensor

from unmask import noise
from unmask.config.settings import Section
from unmask.errors import UserError
from unmask.noise import Purpose
from unmask.tasks.task import DisplayLayout, Grades
from unmask.types import CleanBatch, TokenSpec


class Sorting:
    class Config(Section):
        length: int = 6

    @classmethod
    def from_config(cls, config: Config) -> "Sorting":
        return cls(config.length)

    def __init__(self, length: int) -> None:
        self.length = length
        self.tokens = TokenSpec(vocab_size=11, length=2 * length, mask_id=10)
        self.canvas = DisplayLayout(columns=length)

    def train_stream(self, seed: int) -> "Draws":
        return Draws(self, seed)

    def synthetic_stream(self, seed: int) -> "Draws":
        return Draws(self, seed)

    def validation(self, limit: int) -> CleanBatch:
        return Draws(self, seed=0)[2**40 + torch.arange(limit)]  # so far no training goes

    def examples(self, digits: Tensor) -> CleanBatch:
        x0 = torch.cat([digits, digits.sort(dim=-1).values], dim=-1)
        is_prompt = torch.arange(2 * self.length) < self.length
        return CleanBatch(x0=x0, prompt_mask=is_prompt.expand(x0.shape).clone())

    def read(self, lines: Iterable[str], source: str) -> CleanBatch:
        lines = [line.strip() for line in lines if line.strip()]
        for number, line in enumerate(lines, start=1):
            if len(line) != self.length or not (line.isascii() and line.isdigit()):
                raise UserError(f"{source}, line {number}: {line!r}: not {self.length} digits")
        return self.examples(torch.tensor([[int(digit) for digit in line] for line in lines]))

    def examples_from_file(self, path: Path) -> CleanBatch:
        return self.read(path.read_text().splitlines(), str(path))

    def prompts(self, lines: Iterable[str], source: str) -> Tensor:
        examples = self.read(lines, source)
        return torch.where(examples.prompt_mask, examples.x0, self.tokens.mask_id)

    def grade(self, examples: CleanBatch, tokens: Tensor) -> Grades:
        return Grades({"accuracy": (tokens.cpu() == examples.x0.cpu()).all(dim=-1)})

    def record(self, prompt: Tensor, tokens: Tensor) -> dict[str, list[int]]:
        return {"digits": prompt[: self.length].tolist(), "in_order": tokens[self.length :].tolist()}

    def symbol(self, token: int) -> str:
        return str(token)

    def render(self, tokens: Tensor, is_given: Tensor, is_new: Tensor) -> Text:
        return Text(" ".join("·" if token == self.tokens.mask_id else str(token) for token in tokens.tolist()))


class Draws:
    """Example n, whoever asks for it and when: that is what makes a run resumable."""

    epoch_size = 10_000

    def __init__(self, task: Sorting, seed: int) -> None:
        self.task, self.seed = task, seed

    def __getitem__(self, number: Tensor) -> CleanBatch:
        position = torch.arange(self.task.length)
        return self.task.examples((10 * noise.uniform(self.seed, Purpose.GENERATE, number[:, None], position)).long())
