import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.sudoku import CONTRADICTORY, EASY, EASY_SOLUTION, HARD, NO_SOLUTION, boards
from unmask.errors import UserError
from unmask.tasks.sudoku import board, grading
from unmask.tasks.sudoku.board import PuzzleSet, augment
from unmask.tasks.sudoku.generator import generate
from unmask.tasks.sudoku.task import MASK_ID, Sudoku, SudokuData, split_puzzles


def task(**settings: object) -> Sudoku:
    return Sudoku.from_config(SudokuData(puzzles=100, givens=(40, 45), **settings))


# --- symmetry --------------------------------------------------------------------------------------------------------


def augmented(number: torch.Tensor, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    puzzle, solution = (torch.from_numpy(boards(text).astype(np.int64)) for text in (EASY, EASY_SOLUTION))
    puzzles, solutions = augment(puzzle.expand(len(number), 81), solution.expand(len(number), 81), number, seed)
    return puzzles.numpy(), solutions.numpy()


def test_symmetries_keep_puzzles_puzzles() -> None:
    puzzles, solutions = augmented(torch.arange(500))
    assert board.is_solution(solutions).all()
    assert board.keeps_givens(puzzles, solutions).all()
    assert ((puzzles > 0).sum(1) == 30).all()
    assert len(np.unique(puzzles, axis=0)) == 500


def test_every_symmetry_occurs() -> None:
    """Follow a marked cell and the digit in it: they go everywhere, in both the plain and the transposed half."""
    puzzles, solutions = augmented(torch.arange(20_000))
    for cell in (0, 40):
        counts = np.bincount(solutions[:, cell], minlength=10)[1:]
        assert abs(counts - 20_000 / 9).max() < 5 * (20_000 / 9) ** 0.5
    filled = (puzzles > 0).mean(axis=0)
    assert abs(filled - 30 / 81).max() < 5 * (0.25 / 20_000) ** 0.5 * 1.1
    row_counts = np.sort((puzzles.reshape(-1, 9, 9) > 0).sum(2), axis=1)
    plain = np.sort((boards(EASY).reshape(9, 9) > 0).sum(1))
    transposed = np.sort((boards(EASY).reshape(9, 9) > 0).sum(0))
    is_plain = (row_counts == plain).all(1)
    if not (plain == transposed).all():
        assert abs(is_plain.mean() - 0.5) < 0.02
        assert (is_plain | (row_counts == transposed).all(1)).all()


def test_bands_stay_together() -> None:
    puzzles, _ = augmented(torch.arange(300))
    original = {
        frozenset(band) for band in _band_patterns(boards(EASY)[0]) + _band_patterns(_transpose(boards(EASY)[0]))
    }
    for puzzle in puzzles:
        assert all(frozenset(band) in original for band in _band_patterns(puzzle))


def _transpose(puzzle: np.ndarray) -> np.ndarray:
    return puzzle.reshape(9, 9).T.flatten()


def _band_patterns(puzzle: np.ndarray) -> list[list[tuple[int, int]]]:
    """Per band: for each of its rows, the sorted number of givens in its stacks, and the row's number of givens."""
    cells = puzzle.reshape(3, 3, 3, 3) > 0
    return [[(int(row.sum()), hash(tuple(sorted(row.sum(1).tolist())))) for row in band] for band in cells]


def test_the_number_decides() -> None:
    number = torch.tensor([5, 9, 5])
    puzzles, _ = augmented(number)
    assert (puzzles[0] == puzzles[2]).all()
    assert (puzzles[0] != puzzles[1]).any()
    assert (augmented(number[1:2])[0][0] == puzzles[1]).all()


# --- layouts, stream, split ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["in_place", "two_grid"])
def test_examples_have_the_layout(layout: str) -> None:
    sudoku = task(layout=layout)
    batch = sudoku.train_stream(0)[torch.arange(50)]
    masked = batch.masked(MASK_ID)
    answers = batch.x0[:, -81:].numpy()
    assert board.is_solution(answers).all()
    assert sudoku.tokens.length == batch.x0.shape[1]
    if layout == "in_place":
        num_givens = batch.prompt_mask.sum(1)
        assert (num_givens >= 40).all()
        assert (num_givens <= 45).all()
    else:
        assert batch.prompt_mask[:, :81].all()
        assert not batch.prompt_mask[:, 81:].any()
        clues = batch.x0[:, :81].numpy()
        assert board.keeps_givens(clues, answers).all()
        assert (masked[:, 81:] == MASK_ID).all()


def test_the_stream_has_random_access_and_every_epoch_is_a_permutation() -> None:
    stream = task(augment=False).train_stream(0)
    n = stream.epoch_size
    epochs = [stream[torch.arange(e * n, (e + 1) * n)].x0.numpy() for e in range(2)]
    assert (epochs[0] != epochs[1]).any()
    assert (np.unique(epochs[0], axis=0) == np.unique(epochs[1], axis=0)).all()
    assert torch.equal(stream[torch.tensor([7, 3])].x0, stream[torch.arange(10)].x0[[7, 3]])
    assert not torch.equal(task(augment=False).train_stream(1)[torch.arange(n)].x0, torch.from_numpy(epochs[0]))


def test_augmentation_never_repeats() -> None:
    stream = task().train_stream(0)
    assert len(stream[torch.arange(5 * stream.epoch_size)].x0.unique(dim=0)) == 5 * stream.epoch_size


def test_splits_share_no_puzzle_and_no_grid() -> None:
    sudoku = task(validation_ratio=0.2)
    train, validation, _ = sudoku._split
    assert len(validation) == 20
    assert len(train) + len(validation) == 100
    grids = {bytes(grid) for grid in train.solutions}
    assert not any(bytes(grid) in grids for grid in validation.solutions)


def test_copies_of_a_puzzle_go_to_the_same_side() -> None:
    puzzles, solutions = generate(40, givens=(40, 45), difficulty="singles", seed=0)
    repeated = PuzzleSet(np.repeat(puzzles, 3, axis=0), np.repeat(solutions, 3, axis=0))
    train, validation = split_puzzles(repeated, 0.25, 0)
    assert len(validation) == 10
    assert len(train) == 90
    assert not {bytes(p) for p in train.puzzles} & {bytes(p) for p in validation.puzzles}
    other = split_puzzles(repeated, 0.25, 1)[1]
    assert {bytes(p) for p in other.puzzles} != {bytes(p) for p in validation.puzzles}


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.validation_ratio=0\.001: of 100 distinct puzzles, 0"):
        task(validation_ratio=0.001).validation(1)


# --- grading ---------------------------------------------------------------------------------------------------------


def changed(cell: int, digit: str, text: str = EASY_SOLUTION) -> str:
    return text[:cell] + digit + text[cell + 1 :]


SWAPPED_DIGITS = EASY_SOLUTION.translate(str.maketrans("12", "21"))  # a valid grid that ignores the clues
SWAPPED_IN_ROW = changed(2, EASY_SOLUTION[3], changed(3, EASY_SOLUTION[2]))
SWAPPED_ROWS = EASY_SOLUTION[9:18] + EASY_SOLUTION[:9] + EASY_SOLUTION[18:]


@pytest.mark.parametrize(
    ("puzzle", "answer", "expected"),
    [
        (EASY, EASY_SOLUTION, None),
        (EASY, SWAPPED_DIGITS, "changed_clue"),
        (EASY, SWAPPED_ROWS, "changed_clue"),
        ("0" * 81, SWAPPED_ROWS, None),
        (EASY, changed(2, "9"), "broken_row"),
        ("0" * 81, SWAPPED_IN_ROW, "broken_column"),
        ("0" * 81, "".join(str((i // 9 + i) % 9 + 1) for i in range(81)), "broken_box"),
        (EASY, EASY_SOLUTION[:-1], "wrong_length"),
        (EASY, "", "wrong_length"),
        (EASY, changed(2, "0"), "bad_symbol"),
        (EASY, changed(2, "x"), "bad_symbol"),
        (EASY, changed(2, "²"), "bad_symbol"),
    ],
)
def test_reasons(puzzle: str, answer: str, expected: str | None) -> None:
    assert grading.find_reason(boards(puzzle)[0], answer) == expected
    if len(answer) == 81 and set(answer) <= set("0123456789"):
        assert grading.is_solved(boards(puzzle), boards(answer))[0] == (expected is None)


def test_one_kept_clue_is_not_enough() -> None:
    """A valid grid that shares some clues with the puzzle is wrong unless it shares them all."""
    other = augmented(torch.tensor([1]))[1]
    kept = (boards(EASY) > 0) & (boards(EASY) == other)
    assert kept.any()
    assert not grading.is_solved(boards(EASY), other)[0]


def test_grade_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    empty_solved = board.to_text(boards(EASY_SOLUTION)[0])
    rows = [(EASY, EASY_SOLUTION), (EASY, SWAPPED_DIGITS), ("." * 81, empty_solved), (HARD, "1")]
    path.write_text("\n".join(json.dumps({"puzzle": p, "answer": a, "more": 1}) for p, a in rows) + "\n\n")
    grade, _ = grading.grade_file(path)
    assert (grade.n, grade.correct, grade.n_unique, grade.exact) == (4, 2, 3, 1)
    assert grade.reasons == {"changed_clue": 1, "wrong_length": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: holds no JSON object"),
        ('{"puzzle": "1"}', "line 2: needs the strings"),
        ('{"puzzle": "1", "answer": "2"}', "line 2: a puzzle has 81 cells"),
    ],
)
def test_bad_answer_files_name_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"puzzle": EASY, "answer": ""}) + "\n" + line + "\n")
    with pytest.raises(UserError, match=message):
        grading.grade_file(path)


@pytest.mark.parametrize("layout", ["in_place", "two_grid"])
def test_prompts_grades_records_and_rendering_agree(layout: str) -> None:
    sudoku = task(layout=layout)
    prompts = sudoku.prompts([EASY, "", HARD], "test")
    assert prompts.shape == (2, sudoku.tokens.length)
    examples = sudoku.validation(5)
    right = sudoku.grade(examples, examples.x0).measures
    assert right["accuracy"].all()
    assert right["exact_match"].all()
    wrong = examples.x0.clone()
    wrong[0, -1] = wrong[0, -1] % 9 + 1
    assert sudoku.grade(examples, wrong).measures["accuracy"].tolist() == [False] + [True] * 4
    tokens = prompts[0].clone()
    tokens[-81:] = torch.tensor([int(digit) for digit in EASY_SOLUTION])
    assert sudoku.record(prompts[0], tokens) == {"puzzle": EASY, "answer": EASY_SOLUTION, "solved": True}
    text = sudoku.render(prompts[0], prompts[0] != MASK_ID, torch.zeros_like(prompts[0], dtype=torch.bool)).plain
    assert [symbol for symbol in text if symbol in "·123456789"] == list(EASY.replace("0", "·"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (CONTRADICTORY, "stdin, line 1: the givens contradict"),
        (NO_SOLUTION, "stdin, line 1: the puzzle has no solution"),
        ("12", "stdin, line 1: a puzzle has 81 cells, this has 2"),
        ("", "stdin: holds no puzzle"),
    ],
)
def test_bad_prompts_are_named(line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        task().prompts([line], "stdin")
