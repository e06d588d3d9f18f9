"""What checkpoints cost. (What faults lose is what tests/training/test_faults.py and tests/resume check: nothing.)

python benchmarks/checkpointing.py cost RECIPE [key=value …]    # share of the steps' time
python benchmarks/checkpointing.py size RECIPE [key=value …]    # bytes and seconds of one checkpoint
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unmask.config import recipes
from unmask.config.run import RunConfig
from unmask.tasks.task import build_task
from unmask.training import checkpoint
from unmask.training.trainer import Trainer


def trainer_of(config: RunConfig) -> Trainer:
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    task = build_task(config)
    return Trainer(config, task.tokens, task.synthetic_stream(config.train.seed))


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    started = clock()
    work()
    return clock() - started


@contextmanager
def folder_of_checkpoints() -> Iterator[Path]:
    """On the disk that runs are on (a temporary folder may be memory), where git does not look."""
    Path("runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="checkpointing_", dir="runs") as folder:
        yield Path(folder)


def cost(config: RunConfig, *, rounds: int) -> None:
    """What a step takes, and a checkpoint that is written in the step or beside it.

    A step and the thread's share in CPU seconds, on which what else runs on the machine has little influence; what
    training waits for by the wall.
    """
    trainer = trainer_of(config)
    state: list[dict[str, Any]] = []
    step, copying, writing, waiting = [], [], [], []
    trainer.step()
    with folder_of_checkpoints() as folder:
        for number in range(rounds):
            step.append(seconds(trainer.step, time.thread_time))
            copying.append(seconds(lambda: state.append(checkpoint.snapshot(trainer.state_dict()))))
            save = partial(checkpoint.save, folder, 2 * number)
            writing.append(seconds(partial(save, state[0]), time.thread_time))
            save = partial(checkpoint.save, folder, 2 * number + 1)
            waiting.append(seconds(partial(save, state.pop())))
    one, copy, write, wait = (statistics.median(times) for times in (step, copying, writing, waiting))
    every = one * config.train.checkpoint_every
    print(f"medians of {rounds}: a step {one:.3f} s of CPU; a checkpoint every {config.train.checkpoint_every} of them")
    print(f"in the step: training waits {wait:.3f} s, {wait / every:.3%} of the steps' time")
    print(f"beside it: training waits {copy:.3f} s, {copy / every:.3%}; the thread takes {write:.3f} s of CPU,")
    print(f"    and if no core is free, another {write / every:.3%} from the steps")


def size(config: RunConfig) -> None:
    """One checkpoint after one step, so that the optimizer has its moments."""
    trainer = trainer_of(config)
    trainer.step()
    taken: list[dict[str, Any]] = []
    copying = seconds(lambda: taken.append(checkpoint.snapshot(trainer.state_dict())))
    with folder_of_checkpoints() as folder:
        writing = seconds(lambda: checkpoint.save(folder, 1, taken[0]))
        path = folder / "step_00000001"
        checking = seconds(lambda: checkpoint.damage(path))
        loading = seconds(lambda: checkpoint.load(path))
        total = sum(file.stat().st_size for file in path.iterdir())
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
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    config = recipes.load(given.recipe, given.overrides)
    if given.what == "size":
        size(config)
    else:
        cost(config, rounds=given.rounds)


if __name__ == "__main__":
    main()
