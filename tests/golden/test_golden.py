"""The first steps of every recipe, beside the tests of truths: a change of these numbers is a change of results.

A row is written by `python -m tests.golden.test_golden RECIPE`; these were made with torch 2.13.0 on an x86 CPU. Small
batches in fp32: generated puzzles, or a small model with random tokens or a few lines of text. There is one row for
each process on each kind of task; the other recipes differ from these in sizes and schedules, and are built.
"""

import json
import sys
from pathlib import Path

import pytest

from unmask.config import recipes
from unmask.config.registry import COMPONENTS, resolve
from unmask.training.trainer import Trainer

FILE = Path(__file__).with_name("losses.json")
SMALL = [
    *("train.dtype=float32", "train.compile=false", "train.batch_size=4", "train.accumulate=1"),
    "optim.warmup_steps=2",
]
SMALL_MOVES = ["model={dim: 36, ff_dim: 48, num_layers: 2, num_heads: 2, dropout: 0}"]
SMALL_TEXT = [
    "data={length: 24, vocab_size: 50, mask_id: 49, eos_id: 48, prompt_length: 6}",
    "model={preset: tinygsm-125m, dim: 32, ff_dim: 48, num_layers: 2, num_heads: 4}",
]
SMALL_TASK = {
    "sudoku": ["data.puzzles=64", "data.givens=[40, 45]"],
    "addition": [
        "data={digits: 3, examples: 50, test_chain: null}",
        "model={dim: 32, ff_dim: 48, num_layers: 2, num_heads: 4, dropout: 0}",
    ],
    "tinygsm": SMALL_TEXT,
    "chat": SMALL_TEXT,
    "text": [
        f"data={{path: {FILE.with_name('text.jsonl')}, length: 24, validation_ratio: 0.2}}",
        "model={dim: 32, ff_dim: 48, num_layers: 2, num_heads: 4, dropout: 0}",
    ],
    # without dropout, whose bits are PyTorch's
    "sudoku/ar": ["data.puzzles=64", "data.givens=[40, 45]", *SMALL_MOVES],
    "sudoku/ar_ordered": SMALL_MOVES,
}
NEEDS_DATA = ("tinygsm", "chat", "sudoku/ar_ordered")
STEPS = 4


RECORDED: dict[str, list[float]] = json.loads(FILE.read_text())


def trainer(recipe: str) -> Trainer:
    """The start of a small run of `recipe`."""
    family = recipe.split("/")[0]
    small = [*SMALL, *SMALL_TASK.get(recipe, SMALL_TASK.get(family, SMALL_TASK["sudoku"]))]
    if recipe.startswith(("tinygsm/block_", "text/block_", "chat/block_")):
        small.append("process.block_size=8")
    config = recipes.load(recipe, small)
    if getattr(config.model, "lora", None) is not None:
        pytest.importorskip("peft", reason="needs PEFT: pip install 'unmask[peft]'")
    task = resolve("task", config.task.name).from_config(config.data)
    is_synthetic = recipe.startswith(NEEDS_DATA)
    stream = (task.synthetic_stream if is_synthetic else task.train_stream)(config.train.seed)
    return Trainer(config, task.tokens, stream)


def losses(recipe: str) -> list[float]:
    run = trainer(recipe)
    return [run.step().loss.item() for _ in range(STEPS)]


@pytest.mark.parametrize("recipe", RECORDED)
def test_first_losses(recipe: str) -> None:
    # fp32 rounding, which Adam's first steps enlarge: SSE4, AVX2 and AVX-512 kernels, on one thread or two, differ by
    # up to 5e-6. The rest is for other versions of torch.
    assert losses(recipe) == pytest.approx(RECORDED[recipe], rel=2e-4)


@pytest.mark.parametrize("recipe", sorted({*recipes.names()} - {*RECORDED}))
def test_recipes_that_differ_in_their_sizes_build(recipe: str) -> None:
    assert trainer(recipe).process.requirements.is_causal == recipe.split("/")[1].startswith("ar")


def test_every_process_and_task_is_recorded() -> None:
    configs = [recipes.load(recipe) for recipe in RECORDED]
    assert {config.process.name for config in configs} == COMPONENTS["process"].keys()
    assert {config.task.name for config in configs} == COMPONENTS["task"].keys() - {
        "toy",
        "tokens",
        "pretrained",
        "chat",
    }


def record(asked: list[str]) -> None:
    """Writes the losses of the recipes that are asked for, and leaves the other rows as they are."""
    asked = [*RECORDED] if asked == ["--all"] else asked
    if not asked or not {*asked} <= {*recipes.names()}:
        sys.exit("usage: python -m tests.golden.test_golden (RECIPE... | --all)")
    rows = RECORDED | {recipe: losses(recipe) for recipe in asked}
    FILE.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")


if __name__ == "__main__":
    record(sys.argv[1:])
