import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.stores import EOS, LENGTH, MASK, ROWS, VOCAB, make_task, rows_with_prompts, write_store
from unmask.config.settings import WrongSettings, check_section
from unmask.data.stream import EpochStream
from unmask.errors import UserError
from unmask.tasks.task import Task
from unmask.tasks.tokens import TokensData
from unmask.types import CleanBatch


def row_numbers(batch: CleanBatch) -> list[int]:
    return (batch.x0[:, 0] * EOS + batch.x0[:, 1]).tolist()


def assert_rows_of_the_store(batch: CleanBatch) -> None:
    labels, prompt_mask = rows_with_prompts()
    index = row_numbers(batch)
    assert (batch.x0.numpy() == labels[index]).all()
    assert (batch.prompt_mask.numpy() == prompt_mask[index]).all()


def test_it_is_a_task_and_its_streams_are_streams(folder: Path) -> None:
    task = make_task(path=str(folder))
    assert isinstance(task, Task)
    assert isinstance(task.train_stream(0), EpochStream)
    assert isinstance(task.synthetic_stream(0), EpochStream)
    tokens = task.tokens
    assert (tokens.vocab_size, tokens.length, tokens.mask_id, tokens.eos_id) == (VOCAB, LENGTH, MASK, EOS)


@pytest.mark.parametrize(("ratio", "held_out"), [(0.02, 1), (0.25, 16), (0.98, 63)])
def test_every_row_is_trained_on_or_held_out(folder: Path, ratio: float, held_out: int) -> None:
    task = make_task(path=str(folder), validation_ratio=ratio)
    stream, validation = task.train_stream(0), task.validation(1000)
    training = stream[torch.arange(stream.epoch_size)]
    assert len(validation) == held_out
    assert sorted(row_numbers(training) + row_numbers(validation)) == list(range(ROWS))
    assert_rows_of_the_store(training)
    assert_rows_of_the_store(validation)


def test_the_split_is_that_of_its_seed(folder: Path) -> None:
    held_out = [
        row_numbers(make_task(path=str(folder), validation_ratio=0.25, seed=seed).validation(16)) for seed in (0, 0, 1)
    ]
    assert held_out[0] == held_out[1]
    assert set(held_out[0]) != set(held_out[2])
    assert held_out[0] != sorted(held_out[0])
    assert row_numbers(make_task(path=str(folder), validation_ratio=0.25).validation(5)) == held_out[0][:5]


def test_every_epoch_visits_each_row_once_in_a_new_order(folder: Path) -> None:
    stream = make_task(path=str(folder), validation_ratio=0.25).train_stream(3)
    assert stream.epoch_size == 48
    epochs = [row_numbers(stream[torch.arange(48) + 48 * epoch]) for epoch in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1
    assert len(set(epochs[0])) == 48


def test_a_stream_is_a_function_of_seed_and_number(folder: Path) -> None:
    task = make_task(path=str(folder))
    number = torch.tensor([100, 3, 3, 7])
    first, again, other = (task.train_stream(seed)[number] for seed in (5, 5, 6))
    assert torch.equal(first.x0, again.x0)
    assert torch.equal(first.prompt_mask, again.prompt_mask)
    assert not torch.equal(first.x0, other.x0)
    for i in range(4):
        assert torch.equal(task.train_stream(5)[number[i : i + 1]].x0[0], first.x0[i])


OUT = "holds the mask or an id out of data.vocab_size"
BAD_ROWS = {
    "the mask": ({"labels": MASK}, OUT),
    "out of the vocabulary": ({"labels": VOCAB}, OUT),
    "far out": ({"labels": 2**32 - 1}, OUT),
    "all prompt": ({"prompt_mask": True}, "is all prompt"),
}


@pytest.mark.parametrize(("change", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
@pytest.mark.parametrize("row", [0, 37, ROWS - 1])
def test_a_bad_row_is_named_with_its_folder(tmp_path: Path, change: dict[str, Any], message: str, row: int) -> None:
    labels, prompt_mask = rows_with_prompts()
    if "labels" in change:
        labels[row, 5] = change["labels"]
    else:
        prompt_mask[row] = True
    folder = write_store(tmp_path / "bad", labels, prompt_mask)
    task = make_task(path=str(folder), validation_ratio=0.5)
    stream = task.train_stream(0)
    with pytest.raises(UserError) as caught:
        task.validation(ROWS), stream[torch.arange(stream.epoch_size)]
    assert str(caught.value) == f"{folder}: row {row} {message}"
    for other in (make_task(), make_task(path=str(tmp_path / "absent"))):
        with pytest.raises(UserError) as caught:
            other.examples_from_file(folder)
        assert str(caught.value) == f"{folder}: row {row} {message}"


def test_examples_from_another_store_are_all_of_it_in_order(folder: Path) -> None:
    examples = make_task().examples_from_file(folder)
    assert row_numbers(examples) == list(range(ROWS))
    assert_rows_of_the_store(examples)
    with pytest.raises(UserError, match="its rows have 16 tokens, the model's 24"):
        make_task(length=24).examples_from_file(folder)


def test_another_length_is_named_and_what_to_set(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        make_task(path=str(folder), length=24).train_stream(0)
    assert str(caught.value) == f"{folder}: its rows have 16 tokens; set data.length=16"


def test_without_a_path_only_data_is_missing() -> None:
    task = make_task()
    for read in (lambda: task.train_stream(0), lambda: task.validation(1)):
        with pytest.raises(UserError, match=r"data\.path is missing; give the folder"):
            read()
    assert len(task.synthetic_stream(0)[torch.arange(3)]) == 3
    assert task.prompts(["[1]"], "stdin").shape == (1, LENGTH)


@pytest.mark.parametrize("ratio", [0.001, 0.999])
def test_a_split_with_an_empty_part_is_refused(folder: Path, ratio: float) -> None:
    with pytest.raises(UserError, match=rf"data\.validation_ratio={ratio} of 64 rows leaves a part empty"):
        make_task(path=str(folder), validation_ratio=ratio).validation(1)


BAD_SETTINGS = {
    "mask out": ({"mask_id": VOCAB}, f"data.mask_id={VOCAB}: must be below data.vocab_size={VOCAB}"),
    "end out": ({"eos_id": 99}, f"data.eos_id=99: must be below data.vocab_size={VOCAB}"),
    "mask is end": ({"eos_id": MASK}, f"data.mask_id={MASK} is data.eos_id too"),
    "nothing else": ({"vocab_size": 2, "mask_id": 1, "eos_id": 0}, "data.vocab_size=2 leaves no id beside"),
    "all held out": ({"validation_ratio": 1}, "data.validation_ratio=1: Input should be less than 1"),
}


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_bad_settings_name_key_and_value(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongSettings) as caught:
        check_section(TokensData, {"vocab_size": VOCAB, "mask_id": MASK, "eos_id": EOS} | settings, "data")
    assert message in str(caught.value)


def example(x0: list[int], prompt_length: int) -> CleanBatch:
    return CleanBatch(x0=torch.tensor([x0]), prompt_mask=(torch.arange(len(x0)) < prompt_length)[None])


ROW = [EOS, 2, 3, 4, EOS, EOS, 5, EOS]  # a prompt of 2, the answer 3 4 and its end; what follows does not count
GRADED = {
    "the same": ([], True, True),
    "first id": ([2], False, False),
    "last id before the end": ([3], False, False),
    "the end": ([4], False, False),
    "right after the end": ([5], True, False),
    "an id after the end": ([6], True, False),
    "all after the end": ([5, 6, 7], True, False),
    "before and after": ([3, 7], False, False),
}


@pytest.mark.parametrize(("wrong", "accuracy", "exact_match"), GRADED.values(), ids=GRADED.keys())
def test_an_answer_counts_up_to_its_first_end(wrong: list[int], accuracy: bool, exact_match: bool) -> None:
    tokens = torch.tensor([ROW])
    tokens[:, wrong] = 9
    grades = make_task(length=8).grade(example(ROW, 2), tokens).measures
    assert {name: grade.tolist() for name, grade in grades.items()} == {
        "accuracy": [accuracy],
        "exact_match": [exact_match],
    }


def test_an_end_that_is_not_stored_ends_nothing() -> None:
    stored, said = [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, EOS, EOS, EOS, EOS, EOS, EOS]
    grades = make_task(length=8).grade(example(stored, 2), torch.tensor([said])).measures
    assert not grades["accuracy"].any()


@pytest.mark.parametrize("wrong", range(8))
def test_without_an_end_token_every_position_of_the_answer_counts(wrong: int) -> None:
    tokens = torch.tensor([ROW])
    tokens[:, wrong] = 9
    grades = make_task(length=8, eos_id=None).grade(example(ROW, 2), tokens).measures
    assert grades["accuracy"].tolist() == grades["exact_match"].tolist() == [wrong < 2]


def test_grading_is_what_it_says_row_by_row(folder: Path) -> None:
    examples = make_task().examples_from_file(folder)
    rng = np.random.default_rng(2)
    is_changed = torch.from_numpy(rng.random((ROWS, LENGTH)) < 0.05)
    tokens = torch.where(is_changed, (examples.x0 + 1) % MASK, examples.x0)
    grades = make_task().grade(examples, tokens).measures
    for x0, prompt_mask, row, accuracy, exact in zip(
        examples.x0, examples.prompt_mask, tokens, grades["accuracy"], grades["exact_match"], strict=True
    ):
        stored, said = x0[~prompt_mask].tolist(), row[~prompt_mask].tolist()
        end = stored.index(EOS) + 1 if EOS in stored else len(stored)
        assert accuracy == (stored[:end] == said[:end])
        assert exact == (stored == said)
    assert 0 < grades["exact_match"].sum() < grades["accuracy"].sum() < ROWS


def test_prompts_and_their_answers_there_and_back() -> None:
    task = make_task()
    prompts = [[], [0], [3, 1, EOS, 2], list(range(LENGTH - 1))]
    canvases = task.prompts([f"  {json.dumps(prompt)}\n" for prompt in prompts], "stdin")
    assert canvases.dtype == torch.int64
    for prompt, canvas in zip(prompts, canvases, strict=True):
        assert canvas.tolist() == prompt + [MASK] * (LENGTH - len(prompt))
        answer = list(range(LENGTH - len(prompt)))
        tokens = torch.tensor(prompt + answer)
        assert json.loads(json.dumps(task.record(canvas, tokens))) == {"prompt": prompt, "answer": answer}


def test_prompts_with_positions_to_fill_in() -> None:
    task = make_task()
    full = [None, *range(LENGTH - 1)]
    canvases = task.prompts(["[1, null, 3, null]", '{"prompt": [null, 2], "seed": 3}', json.dumps(full)], "stdin")
    assert canvases[0].tolist() == [1, MASK, 3] + [MASK] * (LENGTH - 3)
    assert canvases[1].tolist() == [MASK, 2] + [MASK] * (LENGTH - 2)
    assert canvases[2].tolist() == [MASK, *range(LENGTH - 1)]
    tokens = torch.arange(LENGTH)
    assert task.record(canvases[0], tokens) == {"prompt": [1, None, 3], "answer": [1, *range(3, LENGTH)]}
    assert task.record(canvases[2], tokens) == {"prompt": full, "answer": [0]}
    with pytest.raises(UserError, match="stdin, line 1: 17 ids leave no room for an answer in 16 positions"):
        task.prompts([json.dumps([None] * (LENGTH + 1))], "stdin")


BAD_PROMPTS = {
    "no JSON": ("1 2 3", "not a JSON list of token ids"),
    "cut short": ("[1, 2", "not a JSON list of token ids"),
    "a number": ("0", "not a list of token ids below 20 other than the mask, or null to fill in: 0"),
    "an object": ("{}", "not a list of token ids below 20 other than the mask, or null to fill in: {}"),
    "null": ("null", "not a list of token ids below 20 other than the mask, or null to fill in: None"),
    "text": ('"12"', "not a list of token ids below 20 other than the mask, or null to fill in: 12"),
    "out of the vocabulary": (
        "[1, 20, 2, 99]",
        "not a list of token ids below 20 other than the mask, or null to fill in: [20, 99]",
    ),
    "the mask": ("[1, 19]", "not a list of token ids below 20 other than the mask, or null to fill in: [19]"),
    "negative": ("[-1]", "not a list of token ids below 20 other than the mask, or null to fill in: [-1]"),
    "a fraction": ("[1.0]", "not a list of token ids below 20 other than the mask, or null to fill in: [1.0]"),
    "true": ("[true]", "not a list of token ids below 20 other than the mask, or null to fill in: [True]"),
    "a list within": ("[[1]]", "not a list of token ids below 20 other than the mask, or null to fill in: [[1]]"),
    "no room": (json.dumps([1] * LENGTH), "16 ids leave no room for an answer in 16 positions"),
}


@pytest.mark.parametrize(("line", "message"), BAD_PROMPTS.values(), ids=BAD_PROMPTS.keys())
def test_a_bad_prompt_is_named_with_its_line(line: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_task().prompts(["[1]", "", line, "[2]"], "prompts.jsonl")
    assert f"prompts.jsonl, line 3: {message}" in str(caught.value)


@pytest.mark.parametrize("content", [[], ["", "  \n"]])
def test_no_prompt_at_all(content: list[str]) -> None:
    with pytest.raises(UserError, match="stdin: holds no prompt; give a JSON list of token ids on each line"):
        make_task().prompts(content, "stdin")


def test_a_canvas_for_the_terminal() -> None:
    tokens = torch.tensor([3, 4, 5, MASK])
    is_given, is_new = torch.tensor([True, False, False, False]), torch.tensor([False, False, True, False])
    text = make_task(length=4, prompt_length=0).render(tokens, is_given, is_new)
    assert text.plain.split() == ["3", "4", "5", "·"]
    assert [span.style for span in text.spans] == ["bold", "green", "black on green", "green"]


@pytest.mark.parametrize(("mask_id", "eos_id"), [(MASK, EOS), (MASK, None), (0, 1), (0, None), (7, 3), (3, 19)])
def test_random_rows_are_all_ids_but_mask_and_end(mask_id: int, eos_id: int | None) -> None:
    rows = make_task(mask_id=mask_id, eos_id=eos_id, prompt_length=5).synthetic_stream(0)[torch.arange(200)]
    assert rows.x0.shape == rows.prompt_mask.shape == (200, LENGTH)
    assert set(rows.x0.unique().tolist()) == set(range(VOCAB)) - {mask_id, eos_id}
    assert torch.equal(rows.prompt_mask, (torch.arange(LENGTH) < 5).expand(200, LENGTH))


def test_a_random_row_is_a_function_of_seed_and_number() -> None:
    def draw(seed: int, *numbers: int) -> Tensor:
        return make_task().synthetic_stream(seed)[torch.tensor(numbers)].x0

    assert torch.equal(draw(0, 5, 9), draw(0, 9, 5).flip(0))
    assert torch.equal(draw(0, 2, 2)[0], draw(0, 2, 2)[1])
    assert len(draw(0, *range(50)).unique(dim=0)) == 50
    assert not torch.equal(draw(0, 5), draw(1, 5))


def test_random_rows_need_room_for_an_answer_but_training_does_not_ask(folder: Path) -> None:
    task = make_task(path=str(folder), prompt_length=LENGTH)
    with pytest.raises(UserError, match=r"data\.prompt_length=16: leaves nothing of data\.length=16"):
        task.synthetic_stream(0)
    assert len(task.train_stream(0)[torch.arange(3)]) == 3
