"""Boards as moves, there and back, in the order that is taught."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import SHORT, lines, run_cli
from tests.helpers.sudoku import CONTRADICTORY, EASY, EASY_SOLUTION, HARD, boards, save, shah_rows
from unmask.errors import UserError
from unmask.tasks.sudoku import board
from unmask.tasks.sudoku.board import Symmetry
from unmask.tasks.sudoku.generator import generate
from unmask.tasks.sudoku.moves import MASK_ID, MovesData, SudokuMoves, play_moves
from unmask.types import CleanBatch

OPEN = np.flatnonzero(boards(EASY)[0] == 0)
GIVEN = np.flatnonzero(boards(EASY)[0])


def task(**settings: object) -> SudokuMoves:
    return SudokuMoves.from_config(MovesData(puzzles=100, givens=(40, 45), **settings))


def solver_file(folder: Path) -> Path:
    """EASY three times: its cells filled backwards, in a shuffled order, and with the givens shuffled too."""
    rng = np.random.default_rng(0)
    orders = [[*GIVEN, *OPEN[::-1]], [*GIVEN, *rng.permutation(OPEN)], [*rng.permutation(GIVEN), *OPEN[::-1]]]
    digits = boards(EASY_SOLUTION)[0]
    rows = [
        [len(GIVEN), *(x for n, cell in enumerate(order) for x in (*divmod(cell, 9), digits[cell], 3 * (n >= 30)))]
        for order in orders
    ]
    return save(folder / "solver.npy", np.array(rows))


def cells(x0: Tensor) -> np.ndarray:
    """Which cell each move names: (N, 81)."""
    row, column, _ = x0.unflatten(1, (81, 3)).unbind(2)
    return (row * 9 + column - 9).numpy()


def easy(sudoku: SudokuMoves) -> CleanBatch:
    return sudoku.encode(*(torch.from_numpy(boards(text).astype(np.int64)) for text in (EASY, EASY_SOLUTION)))


# --- boards and moves ------------------------------------------------------------------------------------------------


def test_a_board_becomes_moves_and_moves_a_board() -> None:
    batch = task().train_stream(0)[torch.arange(50)]
    assert board.is_solution(play_moves(batch.x0)).all()
    kinds = batch.x0.unflatten(1, (81, 3)) // 9
    assert (kinds == torch.tensor([0, 1, 2])).all()
    num_givens = batch.prompt_mask.sum(1)
    assert ((num_givens >= 3 * 40) & (num_givens <= 3 * 45)).all()
    assert (batch.prompt_mask == (torch.arange(243) < num_givens.unsqueeze(1))).all()  # what a causal decoder needs
    puzzles = play_moves(batch.masked(MASK_ID))
    assert (3 * (puzzles > 0).sum(1) == num_givens.numpy()).all()
    assert board.keeps_givens(puzzles, play_moves(batch.x0)).all()


def test_row_major_is_row_major() -> None:
    order = cells(easy(task()).x0)[0]
    assert order.tolist() == [*GIVEN, *OPEN]


def test_the_solvers_order_is_the_files(tmp_path: Path) -> None:
    examples = task(order="solver").examples_from_file(solver_file(tmp_path))
    order = cells(examples.x0)
    assert (order[:, : len(GIVEN)] == GIVEN).all()  # whatever the file says: a prompt is a function of the puzzle
    assert (order[[0, 2], len(GIVEN) :] == OPEN[::-1]).all()
    assert (order[1, len(GIVEN) :] == np.random.default_rng(0).permutation(OPEN)).all()
    assert (play_moves(examples.x0) == boards(EASY_SOLUTION)).all()


@pytest.mark.parametrize("layout", ["rcvs", "vrcs", "srcv"])
def test_the_order_is_found_in_any_quadruples(tmp_path: Path, layout: str) -> None:
    puzzles, solutions = generate(5, givens=(40, 45), difficulty="singles", seed=0)
    path = save(tmp_path / "x.npy", shah_rows(puzzles, solutions, layout))
    order = cells(task(order="solver").examples_from_file(path).x0)
    for puzzle, own in zip(puzzles, order, strict=True):
        open_ = np.flatnonzero(puzzle == 0)
        assert (own[-len(open_) :] == np.random.default_rng(0).permutation(open_)).all()  # as `shah_rows` writes it


def test_the_order_of_real_rows(sudoku_data: Path) -> None:
    path = sudoku_data / "shah_format_derived" / "clue17_singles-sudoku-test-data.npy.gz"
    examples = task(order="solver").examples_from_file(path)
    with gzip.open(path) as file:
        quads = np.load(file)[:, 1:].reshape(-1, 81, 4).astype(np.int64)
    assert (cells(examples.x0)[:, 17:] == (quads[..., 0] * 9 + quads[..., 1])[:, 17:]).all()


def test_symmetries_carry_the_order_along() -> None:
    number = torch.arange(50)
    plain, moved = (task(order="solver", augment=augment).synthetic_stream(0)[number] for augment in (False, True))
    symmetry = Symmetry.draw(number, 0)
    solutions, puzzles = (torch.from_numpy(play_moves(x).astype(np.int64)) for x in (plain.x0, plain.masked(MASK_ID)))
    assert (play_moves(moved.x0) == symmetry.apply(solutions).numpy()).all()
    assert (play_moves(moved.masked(MASK_ID)) == symmetry.apply(puzzles).numpy()).all()
    assert (moved.prompt_mask == plain.prompt_mask).all()
    came_from = symmetry.cell.gather(1, torch.from_numpy(cells(moved.x0))).numpy()
    is_open = ~plain.prompt_mask[:, ::3].numpy()
    assert (came_from == cells(plain.x0))[is_open].all()


# --- grading ---------------------------------------------------------------------------------------------------------


def with_move(x0: Tensor, move: int, *tokens: int) -> Tensor:
    x0 = x0.clone()
    x0[0, 3 * move : 3 * move + 3] = torch.tensor(tokens)
    return x0


def test_right_answers_in_any_order() -> None:
    sudoku = task()
    examples = easy(sudoku)
    moves = examples.x0.unflatten(1, (81, 3))
    shuffled = torch.cat([moves[:, :30], moves[:, 30:].flip(1)], dim=1).flatten(1)
    for tokens in (examples.x0, shuffled):
        assert {name: value.tolist() for name, value in sudoku.grade(examples, tokens).measures.items()} == {
            "accuracy": [True],
            "exact_match": [True],
        }
    empty = sudoku.encode(
        torch.zeros(1, 81, dtype=torch.long), torch.from_numpy(boards(EASY_SOLUTION).astype(np.int64))
    )
    measures = sudoku.grade(empty, empty.x0).measures
    assert measures["accuracy"].all()
    assert not measures["exact_match"].any()  # an empty board has other solutions


def test_wrong_and_malformed_answers() -> None:
    sudoku = task()
    examples = easy(sudoku)
    row, column, digit = examples.x0[0, -3:].tolist()
    wrong = {
        "another digit": with_move(examples.x0, 80, row, column, 18 + (digit - 17) % 9),
        "a column where the row should be": with_move(examples.x0, 80, column, row, digit),
        "a row where the digit should be": with_move(examples.x0, 80, row, column, row),
        "a mask": with_move(examples.x0, 80, row, column, MASK_ID),
        "a cell named twice": with_move(examples.x0, 80, *examples.x0[0, -6:-3].tolist()),
        "a given named again": with_move(examples.x0, 80, *examples.x0[0, :3].tolist()),
        "a given changed": with_move(examples.x0, 0, *examples.x0[0, :2].tolist(), 18 + (examples.x0[0, 2] - 17) % 9),
    }
    for what, tokens in wrong.items():
        assert not sudoku.grade(examples, tokens).measures["accuracy"].any(), what
        record = sudoku.record(examples.masked(MASK_ID)[0], tokens[0])
        assert record["puzzle"] == EASY
        assert not record["solved"], what


def test_of_two_moves_to_a_cell_the_first_stands() -> None:
    tokens = easy(task()).x0
    again = with_move(tokens, 80, *tokens[0, :2].tolist(), 18 + (tokens[0, 2] - 17) % 9)
    expected = boards(EASY_SOLUTION)[0]
    expected[cells(tokens)[0, 80]] = 0
    assert (play_moves(again)[0] == expected).all()


# --- prompts, and readers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["row_major", "solver"])
def test_prompts_hold_the_givens(order: str) -> None:
    sudoku = task(order=order)
    prompts = sudoku.prompts([EASY, "", HARD], "test")
    assert (play_moves(prompts) == boards(EASY, HARD)).all()
    assert (prompts[0] == easy(sudoku).masked(MASK_ID)[0]).all()
    with pytest.raises(UserError, match="stdin, line 1: the givens contradict"):
        sudoku.prompts([CONTRADICTORY], "stdin")
    with pytest.raises(UserError, match="stdin: holds no puzzle"):
        sudoku.prompts([""], "stdin")


def test_records_and_rendering() -> None:
    sudoku = task()
    examples = easy(sudoku)
    prompt = examples.masked(MASK_ID)[0]
    assert sudoku.record(prompt, examples.x0[0]) == {"puzzle": EASY, "answer": EASY_SOLUTION, "solved": True}
    assert [sudoku.symbol(token) for token in (0, 8, 9, 17, 18, 26, MASK_ID)] == ["r1", "r9", "c1", "c9", "1", "9", ""]
    is_given, tokens = examples.prompt_mask[0], prompt.clone()
    tokens[90:95] = examples.x0[0, 90:95]  # a move, and another without its digit
    text = sudoku.render(tokens, is_given, torch.arange(243) == 92)
    expected = list(EASY.replace("0", "·"))
    expected[OPEN[0]] = EASY_SOLUTION[OPEN[0]]
    assert [symbol for symbol in text.plain if symbol in "·123456789"] == expected
    fresh = [text.plain[span.start : span.end] for span in text.spans if span.style == "black on green"]
    assert fresh == [EASY_SOLUTION[OPEN[0]]]


@pytest.mark.parametrize("order", ["row_major", "solver"])
def test_benchmarks_need_no_data(order: str) -> None:
    batch = task(order=order).synthetic_stream(0)[torch.arange(20)]
    assert (np.sort(cells(batch.x0), axis=1) == np.arange(81)).all()
    is_row_major = (np.diff(cells(batch.x0)[:, 45:], axis=1) > 0).all()
    assert is_row_major == (order == "row_major")


# --- bad input -------------------------------------------------------------------------------------------------------


def unordered(folder: Path, name: str) -> Path:
    puzzles, solutions = generate(10, givens=(40, 45), difficulty="singles", seed=0)
    if name == "x.csv":
        path = folder / name
        pairs = [f"{board.to_text(p)},{board.to_text(s)}" for p, s in zip(puzzles, solutions, strict=True)]
        path.write_text("\n".join(["puzzle,solution", *pairs]) + "\n")
        return path
    if name == "162.npy":
        return save(folder / name, np.concatenate([puzzles, solutions], axis=1))
    rows = shah_rows(puzzles, solutions)
    rows[3 if name == "one row.npy" else slice(None), 4::4] = 0
    return save(folder / name, rows)


@pytest.mark.parametrize("name", ["x.csv", "162.npy", "no strategies.npy", "one row.npy"])
def test_files_without_an_order_are_refused(tmp_path: Path, name: str) -> None:
    path = unordered(tmp_path, name)
    settings = {"order": "solver", "path": str(path), "validation_ratio": 0.2}
    with pytest.raises(UserError, match=r"data\.order=solver: .*does not say .*325 .*data\.order=row_major") as caught:
        task(**settings).train_stream(0)
    assert str(path) in str(caught.value)
    assert len(task(**settings | {"order": "row_major"}).validation(5)) == 2


def test_generated_puzzles_have_no_order() -> None:
    with pytest.raises(UserError, match=r"data\.order=solver: generated puzzles \(data\.path=null\) do not say"):
        task(order="solver").validation(1)


def test_answers_without_an_order_can_be_graded(tmp_path: Path) -> None:
    sudoku = task(order="solver")
    examples = sudoku.examples_from_file(unordered(tmp_path, "x.csv"))
    assert not examples.is_known(MASK_ID)
    known = task().examples_from_file(tmp_path / "x.csv")
    assert sudoku.grade(examples, known.x0).measures["accuracy"].all()


# --- as a user types it ----------------------------------------------------------------------------------------------

SMALL = [
    *SHORT,
    "model={dim: 16, ff_dim: 16, num_layers: 1, num_heads: 2}",
    "train={batch_size: 4, compile: false, dtype: float32}",
    "data={puzzles: 40, givens: [40, 45]}",
    "eval.examples=2",
]


def test_training_evaluating_and_decoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert run_cli("train", "sudoku/ar", *SMALL, "--out", run) == 0
    assert lines(run / "metrics.jsonl")[-1]["eval/nelbo"] > 0
    capsys.readouterr()
    assert run_cli("eval", run, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["nfe"]["left_to_right/1"] > 3 * (81 - 45)
    (tmp_path / "x.txt").write_text(f"{EASY}\n{HARD}\n")
    assert run_cli("decode", run, tmp_path / "x.txt", "--out", tmp_path / "out.jsonl") == 0
    records = lines(tmp_path / "out.jsonl")
    assert [record["puzzle"] for record in records] == [EASY, board.to_text(boards(HARD)[0])]
    assert records[0]["nfe"] == 3 * 51
    assert run_cli("grade", tmp_path / "out.jsonl", "--task", "sudoku") == 0


def test_the_solvers_order_needs_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("train", "sudoku/ar_ordered", *SMALL, "--out", tmp_path / "run") == 2
    assert "give data.path" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
