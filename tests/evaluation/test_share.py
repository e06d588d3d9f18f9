"""Of more processes than examples, some evaluate none."""

import pytest
import torch

from tests.helpers import exact, toy
from unmask.decoding.config import DecodeConfig
from unmask.evaluation.accuracy import Answers, grade_answers
from unmask.evaluation.nelbo import batches_of, row_nelbos

NONE = slice(3, None, 4)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_each_example_is_in_one_batch_of_one_process(size: int) -> None:
    batches = [batches_of(5, slice(rank, None, size), 2) for rank in range(size)]
    assert sorted(torch.cat([rows for own in batches for rows in own]).tolist()) == [0, 1, 2, 3, 4]
    assert all(1 <= len(rows) <= 2 for own in batches for rows in own)


def test_a_process_without_examples_has_nothing_to_say() -> None:
    task = toy()
    examples = task.validation(3)
    assert row_nelbos(exact(task), examples, share=NONE).nll.tolist() == [0, 0, 0]
    assert grade_answers(exact(task), task, examples, DecodeConfig(), share=NONE) == Answers({}, [])
