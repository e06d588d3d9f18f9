"""Small stand-ins that several tests share; beside it, one file a topic."""

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from unmask import noise
from unmask.cli import main
from unmask.models.denoiser import Denoiser
from unmask.noise import Purpose
from unmask.tasks.toy import Toy, ToyData
from unmask.training.logging import lines_that_count
from unmask.types import CleanBatch, MaskedBatch, TokenStats

SHORT = ["train.steps=4", "train.checkpoint_every=2", "eval.every=4", "log.tensorboard=false", "log.every=1"]
"""Settings that make a debug run shorter still."""


@dataclass
class RandomStream:
    """Random tokens, the first `n % (length // 2)` of which are the prompt; remembers what was fetched."""

    length: int
    vocab_size: int

    def __post_init__(self) -> None:
        self.fetched: list[int] = []

    @property
    def epoch_size(self) -> int:
        return 1000

    def __getitem__(self, number: Tensor) -> CleanBatch:
        self.fetched += number.tolist()
        position = torch.arange(self.length)
        u = noise.uniform(99, Purpose.SHUFFLE, number.unsqueeze(1), position)
        prompt_mask = position < (number % (self.length // 2)).unsqueeze(1)
        return CleanBatch(x0=(u * (self.vocab_size - 1)).long(), prompt_mask=prompt_mask)


def random_stats(batch: MaskedBatch, seed: int) -> TokenStats:
    """What a model might say of `batch`: a function of seed and position."""
    u = noise.uniform(seed, Purpose.CONFIDENCE, batch.scored)
    return TokenStats(nll=1 - u, confidence=u, top1=u)


class TabularBackbone(nn.Module):
    """A free logit for every canvas, position and value: it can represent any denoiser of a toy distribution."""

    def __init__(self, toy: Toy) -> None:
        super().__init__()
        self.vocab_size, length = toy.tokens.vocab_size, toy.tokens.length
        self.table = nn.Parameter(torch.zeros(self.vocab_size**length, length, self.vocab_size, dtype=torch.float64))
        self.register_buffer("place", self.vocab_size ** torch.arange(length - 1, -1, -1))
        self.register_buffer("head_weight", torch.eye(self.vocab_size, dtype=torch.float64))

    def code(self, xt: Tensor) -> Tensor:
        return (xt * self.place).sum(dim=-1)

    def forward(self, xt: Tensor, at: Tensor) -> Tensor:
        return self.table[self.code(xt)].flatten(0, 1)[at]


class InBlocks(Denoiser):
    """What a model in blocks says, from one of whole canvases: a block sees itself and the clean blocks before it."""

    def __init__(self, plain: Denoiser, block_size: int) -> None:
        super().__init__(plain.backbone, mask_id=plain.mask_id, confidence=plain.confidence)
        self.plain, self.size = plain, block_size

    @property
    def block_size(self) -> int:
        return self.size

    def canvases(self, batch: MaskedBatch) -> Tensor:
        """(B, N, L): what each block sees; what follows it is masked."""
        block = torch.arange(batch.x0.shape[1]) // self.size
        seen = [
            torch.where(block < n, batch.x0, torch.where(block == n, batch.xt, self.mask_id))
            for n in range(int(block[-1]) + 1)
        ]
        return torch.stack(seen, dim=1)

    def forward(self, batch: MaskedBatch) -> TokenStats:
        length = batch.x0.shape[1]
        row, position = batch.at // length, batch.at % length
        seen = self.canvases(batch)[row, position // self.size]
        logits = self.plain.logits(seen, torch.arange(len(seen)) * length + position)
        return TokenStats.from_logits(logits, batch.gather(batch.x0), confidence=self.confidence)


def toy(**settings: float) -> Toy:
    return Toy.from_config(ToyData(**settings))


def tabular(task: Toy) -> Denoiser:
    return Denoiser(TabularBackbone(task), mask_id=task.tokens.mask_id)


def exact(task: Toy) -> Denoiser:
    """The denoiser whose predictions are the true conditionals."""
    model = tabular(task)
    for xt in all_canvases(task).split(512):
        at = torch.arange(xt.numel())
        logits = task.posterior(xt, at).nan_to_num(nan=0.0).view(*xt.shape, -1)  # nan: a canvas that cannot occur
        model.backbone.table.data[model.backbone.code(xt)] = logits.clamp(min=-1e9)
    return model


def all_canvases(task: Toy) -> Tensor:
    return torch.tensor(list(product(range(task.tokens.vocab_size), repeat=task.tokens.length)))


def run_cli(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def metrics_of(run: Path) -> list[dict]:
    """The lines of `metrics.jsonl` that count, without what the clock says."""
    rows = (json.loads(line) for _, line in lines_that_count((run / "metrics.jsonl").read_bytes()) if line)
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same(one: object, other: object) -> None:
    """Compares states: dicts of dicts, tensors and plain values, bit for bit."""
    if isinstance(one, dict):
        assert isinstance(other, dict)
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Measures in standard deviations above the mean: above 5 about once in a million for a true hypothesis."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = counts.numel() - 1
    return float((statistic - degrees) / (2 * degrees) ** 0.5)
