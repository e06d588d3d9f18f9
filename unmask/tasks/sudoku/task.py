"""Sudoku as a masked-diffusion task.

Tokens are the digits 1 to 9, 0 for an empty clue cell, and the mask, 10. Two layouts: `in_place`, 81 tokens, of which
the givens are the prompt; `two_grid`, 162 tokens, 81 clue cells as the prompt and then 81 answer cells (the PUMA
paper's). Dimensions: N examples, B rows, L positions.
"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from unmask.tasks.sudoku.board import Boards
from unmask.tasks.sudoku.board_task import BoardTask
from unmask.tasks.sudoku.data import PuzzleData
from unmask.tasks.task import Canvas
from unmask.types import CleanBatch, TokenSpec

Layout = Literal["in_place", "two_grid"]
MASK_ID = 10


class SudokuData(PuzzleData):
    layout: Layout = Field(
        "in_place", description="81 tokens (the givens are the prompt), or 162 (clues, then answers)"
    )


class Sudoku(BoardTask):
    Config = SudokuData

    def __init__(self, config: SudokuData) -> None:
        self.layout: Layout = config.layout
        length = 81 if config.layout == "in_place" else 162
        super().__init__(
            config,
            TokenSpec(vocab_size=MASK_ID + 1, length=length, mask_id=MASK_ID),
            Canvas(columns=9, start=length - 81, box=3, clue_start=None if length == 81 else 0),
        )

    @classmethod
    def from_config(cls, config: SudokuData) -> "Sudoku":
        return cls(config)

    def encode(
        self, puzzles: Int[Tensor, "N 81"], solutions: Int[Tensor, "N 81"], turns: Int[Tensor, "N 81"] | None = None
    ) -> CleanBatch:
        if self.layout == "in_place":
            return CleanBatch(x0=solutions, prompt_mask=puzzles > 0)
        is_clue = torch.ones_like(puzzles, dtype=torch.bool)
        prompt_mask = torch.cat([is_clue, ~is_clue], dim=1)
        return CleanBatch(x0=torch.cat([puzzles, solutions], dim=1), prompt_mask=prompt_mask)

    def clues(self, prompts: Int[Tensor, "B L"]) -> Boards:
        clues = prompts[:, :81].cpu()
        return torch.where(clues == MASK_ID, 0, clues).numpy().astype(np.uint8)

    def answers(self, tokens: Int[Tensor, "B L"]) -> Boards:
        return tokens[:, -81:].cpu().numpy().astype(np.uint8)

    def symbol(self, token: int) -> str:
        return "" if token == 0 else str(token)
