"""The first steps of every recipe, beside the tests of truths: a change of these numbers is a change of results.

Made by `python -m tests.golden.test_golden`, with torch 2.13.0 on an x86 CPU. Small batches in fp32: generated puzzles,
or a small model with random tokens or a few lines of text.
"""

import json
from pathlib import Path

import pytest

from unmask.config import recipes
from unmask.config.registry import resolve
from unmask.training.trainer import Trainer

FILE = Path(__file__).with_name("losses.json")
SMALL = ["train.dtype=float32", "train.compile=false", "train.batch_size=4", "optim.warmup_steps=2"]
SMALL_MOVES = ["model={dim: 36, ff_dim: 48, num_layers: 2, num_heads: 2, dropout: 0}"]
SMALL_TEXT = [
    "data={length: 24, vocab_size: 50, mask_id: 49, eos_id: 48, prompt_length: 6}",
    "model={preset: tinygsm-125m, dim: 32, ff_dim: 48, num_layers: 2, num_heads: 4}",
]
SMALL_TASK = {
    "sudoku": ["data.puzzles=64", "data.givens=[40, 45]"],
    "tinygsm": SMALL_TEXT,
    "text": [
        f"data={{path: {FILE.with_name('text.jsonl')}, length: 24, validation_ratio: 0.2}}",
        "model={dim: 32, ff_dim: 48, num_layers: 2, num_heads: 4, dropout: 0}",
    ],
    # without dropout, whose bits are PyTorch's
    "sudoku/ar": ["data.puzzles=64", "data.givens=[40, 45]", *SMALL_MOVES],
    "sudoku/ar_ordered": SMALL_MOVES,
}
NEEDS_DATA = ("tinygsm", "sudoku/ar_ordered")
STEPS = 4


def losses(recipe: str) -> list[float]:
    family = recipe.split("/")[0]
    small = [*SMALL, *SMALL_TASK.get(recipe, SMALL_TASK.get(family, SMALL_TASK["sudoku"]))]
    if recipe.startswith(("tinygsm/block_", "text/block_")):
        small.append("process.block_size=8")
    config = recipes.load(recipe, small)
    task = resolve("task", config.task.name).from_config(config.data)
    is_synthetic = recipe.startswith(NEEDS_DATA)
    stream = (task.synthetic_stream if is_synthetic else task.train_stream)(config.train.seed)
    trainer = Trainer(config, task.tokens, stream)
    return [trainer.step().loss.item() for _ in range(STEPS)]


@pytest.mark.parametrize("recipe", recipes.names())
def test_first_losses(recipe: str) -> None:
    # fp32 rounding, which Adam's first steps enlarge: SSE4, AVX2 and AVX-512 kernels, on one thread or two, differ by
    # up to 5e-6. The rest is for other versions of torch.
    assert losses(recipe) == pytest.approx(json.loads(FILE.read_text())[recipe], rel=2e-4)


if __name__ == "__main__":
    FILE.write_text(json.dumps({recipe: losses(recipe) for recipe in recipes.names()}, indent=1) + "\n")
