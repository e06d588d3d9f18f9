"""The first steps of every recipe, beside the tests of truths: a change of these numbers is a change of results.

Made by `python -m tests.golden.test_golden`, with torch 2.13.0 on an x86 CPU. Small batches of generated puzzles, fp32.
"""

import json
from pathlib import Path

import pytest

from unmask import recipes
from unmask.registry import resolve
from unmask.training.trainer import Trainer

FILE = Path(__file__).with_name("losses.json")
SMALL = [
    "train.dtype=float32",
    "train.compile=false",
    "train.batch_size=4",
    "data.puzzles=64",
    "data.givens=[40, 45]",
    "optim.warmup_steps=2",
]
STEPS = 4


def losses(recipe: str) -> list[float]:
    config = recipes.load(recipe, SMALL)
    task = resolve("task", config.task.name).from_config(config.data)
    trainer = Trainer(config, task.tokens, task.train_stream(config.train.seed))
    return [trainer.step().loss.item() for _ in range(STEPS)]


@pytest.mark.parametrize("recipe", recipes.names())
def test_first_losses(recipe: str) -> None:
    # fp32 rounding, which Adam's first steps enlarge: SSE4, AVX2 and AVX-512 kernels, on one thread or two, differ by
    # up to 5e-6. The rest is for other versions of torch.
    assert losses(recipe) == pytest.approx(json.loads(FILE.read_text())[recipe], rel=2e-4)


if __name__ == "__main__":
    FILE.write_text(json.dumps({recipe: losses(recipe) for recipe in recipes.names()}, indent=1) + "\n")
