"""What was trained on, and whether the model knows it by heart."""

from dataclasses import dataclass

import pytest
import torch

from tests.helpers import exact, tabular, toy
from tests.lab.diagnostics.untrained import toy_settings, untrained_run
from unmask.lab.diagnostics.diagnose import Diagnosis, tables
from unmask.lab.diagnostics.overfitting import find_first, find_last_finished, measure_overfitting
from unmask.types import CleanBatch


@pytest.mark.parametrize(
    "process",
    ["{name: uniform}", "{name: puma, num_stages: 3, threshold: 0.5}"],
)
def test_the_last_examples_done_are_done(process: str) -> None:
    """Against a record of what every step trained on: such an example is in no batch any more, and was in one."""
    run = untrained_run(*toy_settings(f"process={process}", "train.batch_size=4"))
    run.trainer().stream = _Counting()
    batches = [_Counting.number(run.trainer().step().batch.x0) for _ in range(9)]
    trained = {number for batch in batches for number in batch}
    found = find_last_finished(run.trainer(), 3).tolist()
    assert len(found) == 3
    assert found == sorted(found, reverse=True)
    assert set(found) <= trained - set(batches[-1])
    assert max(found) >= max(trained) - 5 * 4  # recent: no row is more than a few examples ahead


def test_what_a_restarted_pool_passed_over_does_not_count() -> None:
    run = untrained_run(*toy_settings("process={name: puma, num_stages: 3, threshold: 0.5}", "train.batch_size=4"))
    trainer = run.trainer()
    trainer.stream = _Counting()
    batches = [_Counting.number(trainer.step().batch.x0) for _ in range(9)]
    trainer.process.load_state_dict(trainer.process.drop_rows(trainer.process.state_dict()))
    last = max(batches[-1])
    for steps in (1, 8):
        batches += [_Counting.number(trainer.step().batch.x0) for _ in range(steps)]
        trained = {number for batch in batches for number in batch}
        assert set(range(last)) - trained  # there is something to be counted by mistake
        found = find_last_finished(trainer, 40).tolist()
        assert set(found) <= trained
        assert bool(found) == (steps == 8)
        assert set(find_first(trainer, trainer.process.examples_seen, 40).tolist()) <= trained


class _Counting:
    """Example n is written with the digits of n, to the base 3."""

    place = 3 ** torch.arange(5, -1, -1)
    epoch_size = 3**6

    def __getitem__(self, number: torch.Tensor) -> CleanBatch:
        x0 = number.unsqueeze(1) // self.place % 3
        return CleanBatch(x0=x0, prompt_mask=torch.zeros_like(x0, dtype=torch.bool))

    @classmethod
    def number(cls, x0: torch.Tensor) -> list[int]:
        return (x0 * cls.place).sum(dim=1).tolist()


@dataclass
class _One:
    """A training set of one sequence."""

    x0: torch.Tensor
    epoch_size: int = 1

    def __getitem__(self, number: torch.Tensor) -> CleanBatch:
        x0 = self.x0.expand(len(number), -1)
        return CleanBatch(x0=x0, prompt_mask=torch.zeros_like(x0, dtype=torch.bool))


def test_a_model_that_knows_its_examples_by_heart_is_found_out() -> None:
    task = toy(values=3, length=6)
    model = tabular(task)
    sequence = task.sequences[7]
    model.backbone.table.data.scatter_(2, sequence.view(1, -1, 1).expand(len(model.backbone.table), -1, 1), 3.0)
    run = untrained_run(*toy_settings("process={name: uniform}", "train.batch_size=4"), model=model)
    run.trainer().stream = _One(sequence)
    run.trainer().process.step = run.trainer().step_number = 10
    found = measure_overfitting(run, run.task.validation(40), draws=2, on_progress=lambda share: None)
    assert (found.examples_seen, found.distinct, found.passes, found.visits) == (40, 1, 40, 40)
    assert found.steps_per_example == 1
    assert found.recent is not None
    gap = found.gap(found.recent)
    assert gap.value > 10 * gap.stderr > 0
    (table,) = tables(Diagnosis(10, "raw", overfitting=found))
    assert table.title.startswith("40 examples drawn, of 1 entries of the data (40 passes)")


def test_the_true_conditionals_know_nothing_by_heart() -> None:
    run = untrained_run(
        *toy_settings("process={name: uniform}", "train.batch_size=32"), model=exact(toy(values=3, length=6))
    )
    run.trainer().process.step = run.trainer().step_number = 10
    found = measure_overfitting(run, run.task.validation(100), draws=2, on_progress=lambda share: None)
    assert found.recent is not None
    for trained in (found.recent, found.early):
        gap = found.gap(trained)
        assert abs(gap.value) < 4 * gap.stderr
