"""Sudoku as a sequence of moves, for autoregressive models (Shah et al. 2024, 2409.10502).

A canvas is 81 moves of three tokens: row (0 to 8), column (9 to 17), digit (18 to 26); the mask is 27. The givens come
first, in row-major order, and are the prompt, whose length differs from puzzle to puzzle. Then come the other cells
in the order that is taught: row-major, or that of a solver. Dimensions: N examples, B rows, L positions.
"""

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from unmask.errors import UserError
from unmask.tasks.sudoku.board import Boards, PuzzleSet
from unmask.tasks.sudoku.task import BoardTask, PuzzleData
from unmask.tasks.task import DisplayLayout
from unmask.types import CleanBatch, TokenSpec

MASK_ID = 27
_FIRST = torch.tensor([0, 9, 17])  # ids of row 0, column 0 and digit 0, which no move has
_OUTSIDE = 81


class MovesData(PuzzleData):
    """The settings of `SudokuMoves`."""

    order: Literal["row_major", "solver"] = Field(
        "row_major", description="of the cells to fill; solver: as the solver of data.path, rows of 325 integers, did"
    )


class SudokuMoves(BoardTask):
    """Sudoku whose answer is a sequence of moves, graded by the board that they make.

    Of two moves to one cell the first stands; tokens that form no move are left out. Since 81 moves just fill the
    board, either leaves a cell empty, and the answer is wrong.
    """

    Config = MovesData
    config: MovesData

    def __init__(self, config: MovesData) -> None:
        tokens = TokenSpec(vocab_size=MASK_ID + 1, length=243, mask_id=MASK_ID)
        super().__init__(config, tokens, DisplayLayout(columns=27, box=3))  # nine moves a line, ruled between them
        self.with_turns = config.order == "solver"

    @classmethod
    def from_config(cls, config: MovesData) -> "SudokuMoves":
        return cls(config)

    def _load(self) -> PuzzleSet:
        if not self.with_turns:
            return super()._load()
        path = self.config.path
        puzzles = None if path is None else super()._load()
        if puzzles is None or puzzles.turns is None:
            source = "generated puzzles (data.path=null) do" if path is None else f"data.path={path} does"
            raise UserError(
                f"data.order=solver: {source} not say in which order a solver filled the cells; give data.path a .npy "
                "of rows of 325 integers, each with its solver's strategies, or set data.order=row_major"
            )
        return puzzles

    def _examples(self, puzzles: PuzzleSet) -> CleanBatch:
        """Makes examples; an answer whose order is unknown can be graded, but has no tokens."""
        examples = super()._examples(puzzles)
        is_known = puzzles.turns is not None or not self.with_turns
        return examples if is_known else replace(examples, x0=examples.masked(MASK_ID))

    def encode(
        self, puzzles: Int[Tensor, "N 81"], solutions: Int[Tensor, "N 81"], turns: Int[Tensor, "N 81"] | None = None
    ) -> CleanBatch:
        is_given = puzzles > 0
        when = torch.where(is_given, -1, 0 if turns is None else turns)
        cell = when.argsort(dim=1, stable=True)  # row-major where it is a draw
        moves = torch.stack([cell // 9, cell % 9, solutions.gather(1, cell)], dim=2) + _FIRST
        return CleanBatch(x0=moves.flatten(1), prompt_mask=is_given.gather(1, cell).repeat_interleave(3, dim=1))

    def clues(self, prompts: Int[Tensor, "B L"]) -> Boards:
        return play_moves(prompts)

    def answers(self, tokens: Int[Tensor, "B L"]) -> Boards:
        return play_moves(tokens)

    def symbol(self, token: int) -> str:
        kind, number = divmod(token, 9)
        return f"{('r', 'c', '')[kind]}{number + 1}" if token != MASK_ID else ""


def play_moves(tokens: Int[Tensor, "B 243"]) -> Boards:
    """Makes the boards (B, 81) of moves: the first to a cell stands; tokens that form no move (yet) are left out."""
    row, column, digit = (tokens.cpu().unflatten(1, (81, 3)) - _FIRST).unbind(dim=2)
    is_move = (row >= 0) & (row < 9) & (column >= 0) & (column < 9) & (digit >= 1) & (digit <= 9)
    cell = torch.where(is_move, row * 9 + column, _OUTSIDE)
    boards = torch.zeros(len(tokens), _OUTSIDE + 1, dtype=torch.long)
    for move in reversed(range(81)):
        boards.scatter_(1, cell[:, move : move + 1], digit[:, move : move + 1])
    return boards[:, :_OUTSIDE].numpy().astype(np.uint8)
