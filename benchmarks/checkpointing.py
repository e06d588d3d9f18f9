"""What checkpoints cost. (What faults lose is what tests/training/test_faults.py and tests/resume check: nothing.)

python benchmarks/checkpointing.py cost RECIPE [key=value …]    # share of the step time, in step and in background
python benchmarks/checkpointing.py size RECIPE [key=value …]    # bytes and seconds of one checkpoint
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from unmask import recipes
from unmask.config import RunConfig
from unmask.tasks.build import build_task
from unmask.training import checkpoint
from unmask.training.background import Background
from unmask.training.trainer import Trainer


def trainer_of(config: RunConfig) -> Trainer:
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    task = build_task(config)
    return Trainer(config, task.tokens, task.synthetic_stream(config.train.seed))


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def cost(config: RunConfig, *, every: int, rounds: int) -> None:
    """Rounds of `every` steps without a checkpoint, with one in the step, and with one beside the steps, in turn."""
    trainer, background = trainer_of(config), Background()
    folder = Path(tempfile.mkdtemp(prefix="checkpointing_", dir="."))

    def in_step() -> None:
        checkpoint.save(folder, trainer.step_number, trainer.state_dict())
        checkpoint.prune(folder, keep_last=1, keep_every=None, keep=set())

    def in_background() -> None:
        step, state = trainer.step_number, checkpoint.snapshot(trainer.state_dict())

        def write() -> None:
            checkpoint.save(folder, step, state)
            checkpoint.prune(folder, keep_last=1, keep_every=None, keep=set())

        background.start(write)

    ways: dict[str, Callable[[], object]] = {"none": lambda: None, "in step": in_step, "background": in_background}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    held: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3):
        trainer.step()
    for _ in range(rounds):
        for name, save in ways.items():
            held[name].append(seconds(save))
            taken[name].append(held[name][-1] + sum(seconds(trainer.step) for _ in range(every)))
            background.wait()
    shutil.rmtree(folder)
    plain = statistics.median(taken["none"])
    print(f"a checkpoint every {every} steps of {plain / every:.3f} s; medians of {rounds} rounds")
    for name in ("in step", "background"):
        longer = statistics.median(taken[name]) / plain - 1
        stood = statistics.median(held[name]) / (plain / every)
        print(f"{name:>10}: {longer:+.1%} of training time; training stands still for {stood:.2f} steps")


def size(config: RunConfig) -> None:
    """One checkpoint after one step, so that the optimizer has its moments."""
    trainer = trainer_of(config)
    trainer.step()
    folder = Path(tempfile.mkdtemp(prefix="checkpointing_", dir="."))
    taken: list[dict] = []
    copying = seconds(lambda: taken.append(checkpoint.snapshot(trainer.state_dict())))
    writing = seconds(lambda: checkpoint.save(folder, 1, taken[0]))
    path = folder / "step_00000001"
    checking = seconds(lambda: checkpoint.damage(path))
    loading = seconds(lambda: checkpoint.load(path))
    total = sum(file.stat().st_size for file in path.iterdir())
    shutil.rmtree(folder)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{parameters:,} parameters: {total / 1e9:.3f} GB, {total / parameters:.1f} bytes each")
    print(
        f"copy {copying:.2f} s, write, checksum and sync {writing:.2f} s, check {checking:.2f} s, load {loading:.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "size"])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    config = recipes.load(given.recipe, given.overrides)
    if given.what == "size":
        size(config)
    else:
        cost(config, every=given.every, rounds=given.rounds)


if __name__ == "__main__":
    main()
