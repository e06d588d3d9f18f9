"""What Muon costs: CPU seconds of a training step beside the same step with AdamW.

    OMP_NUM_THREADS=1 python -m benchmarks.optim sudoku/uniform
    OMP_NUM_THREADS=1 python -m benchmarks.optim tinygsm/uniform_small data.vocab_size=16384

Two trainings of a recipe take their steps in turn, in one process and on the same random rows, so that a busy machine
slows both. Printed are medians, and the median and quartiles of the ratio of a pair.
"""

import argparse
import statistics
import time

import torch

from unmask.config import recipes
from unmask.tasks.task import build_task
from unmask.training.trainer import Trainer

NAMES = ("adamw", "muon")
WARM_UP = 4


def build(recipe: str, settings: list[str], name: str) -> Trainer:
    config = recipes.load(recipe, [*settings, "train.threads=1", f"optim.name={name}"])
    task = build_task(config)
    return Trainer(config, task.tokens, task.synthetic_stream(config.train.seed))


class Timed:
    """A training whose steps are timed, and within them the optimizer's."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.totals: list[float] = []
        self.updates: list[float] = []
        self._step = trainer.optimizer.step
        trainer.optimizer.step = self._update  # type: ignore[method-assign]

    def step(self) -> None:
        started = time.process_time()
        self.trainer.step()
        self.totals.append(time.process_time() - started)

    def clear(self) -> None:
        self.totals, self.updates = [], []

    def _update(self, lr: float, is_bad: torch.Tensor) -> None:
        started = time.process_time()
        self._step(lr, is_bad)
        self.updates.append(time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", help="such as train.compile=false")
    parser.add_argument("--steps", type=int, default=40, help="steps of each that count")
    options = parser.parse_args()
    torch.set_num_threads(1)
    adamw, muon = (Timed(build(options.recipe, options.settings, name)) for name in NAMES)
    adamw.trainer.choose_attention()
    muon.trainer.choose_attention(adamw.trainer.attention)
    for number in range(WARM_UP + options.steps):
        adamw.step()
        muon.step()
        if number < WARM_UP:
            adamw.clear()
            muon.clear()
    ratios = [other / one for one, other in zip(adamw.totals, muon.totals, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{options.recipe}: a step with Muon takes {middle:.3f} times AdamW's ({low:.3f} to {high:.3f})")
    for name, timed in zip(NAMES, (adamw, muon), strict=True):
        step, update = statistics.median(timed.totals), statistics.median(timed.updates)
        print(f"  {name}: {step:.4f} s a step, of which the update {update:.4f} s, {update / step:.1%}")


if __name__ == "__main__":
    main()
