"""Sudoku as a masked-diffusion task.

Tokens are the digits 1 to 9, 0 for an empty clue cell, and the mask, 10. Two layouts: `in_place`, 81 tokens, of which
the givens are the prompt; `two_grid`, 162 tokens, 81 clue cells as the prompt and then 81 answer cells (the PUMA
paper's). Dimensions: N examples, L positions.
"""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from pydantic import Field, field_validator
from rich.text import Text
from torch import Tensor

from unmask import noise
from unmask.config import Section
from unmask.data.stream import shuffled_index
from unmask.errors import UserError
from unmask.noise import Purpose
from unmask.tasks.sudoku import board, cache, files, grading
from unmask.tasks.sudoku.generator import Difficulty, check_givens
from unmask.tasks.sudoku.puzzles import PuzzleSet
from unmask.tasks.sudoku.solver import solve
from unmask.tasks.sudoku.symmetry import augment
from unmask.tasks.task import Canvas, Grades
from unmask.types import CleanBatch, TokenSpec

Layout = Literal["in_place", "two_grid"]
MASK_ID = 10


class SudokuData(Section):
    layout: Layout = Field(
        "in_place", description="81 tokens (the givens are the prompt), or 162 (clues, then answers)"
    )
    path: str | None = Field(None, description=".csv, .txt or .npy of puzzles; null = generated")
    puzzles: int = Field(20_000, ge=2, description="how many to generate")
    givens: tuple[int, int] = Field((29, 37), description="fewest and most givens of a generated puzzle (24 to 50)")
    difficulty: Difficulty = Field(
        "singles", description="of generated puzzles: solvable by naked and hidden singles, or harder"
    )
    augment: bool = Field(True, description="a random symmetry for every example drawn")
    validation_ratio: float = Field(0.05, gt=0, lt=1)
    seed: int = Field(0, ge=0, description="of the generator and of the split")
    cache_dir: str | None = Field(None, description="null = $UNMASK_CACHE or ~/.cache/unmask")

    @field_validator("givens", mode="before")
    @classmethod
    def _one_number_is_both_ends(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @field_validator("givens")
    @classmethod
    def _check_givens(cls, value: tuple[int, int]) -> tuple[int, int]:
        check_givens(value)
        return value


class Sudoku:
    Config = SudokuData

    def __init__(self, config: SudokuData) -> None:
        self.config = config
        length = 81 if config.layout == "in_place" else 162
        self.tokens = TokenSpec(vocab_size=MASK_ID + 1, length=length, mask_id=MASK_ID)
        self.canvas = Canvas(columns=9, start=length - 81, box=3, clue_start=None if length == 81 else 0)

    @classmethod
    def from_config(cls, config: SudokuData) -> "Sudoku":
        return cls(config)

    @cached_property
    def _split(self) -> tuple[PuzzleSet, PuzzleSet]:
        config = self.config
        if config.path is not None:
            puzzles = files.load(Path(config.path).expanduser())
        else:
            folder = Path(config.cache_dir).expanduser() if config.cache_dir else cache.default_folder()
            puzzles = cache.load_or_generate(config.puzzles, config.givens, config.difficulty, config.seed, folder)
        return split(puzzles, config.validation_ratio, config.seed)

    def train_stream(self, seed: int) -> "SudokuStream":
        return SudokuStream(self._split[0], self.config.layout, seed, is_augmented=self.config.augment)

    def synthetic_stream(self, seed: int) -> "SudokuStream":
        """Random digits with as many clues as `data.givens` says: not puzzles, but of their shape and cost."""
        rng = np.random.default_rng(noise.integer(seed, Purpose.BENCHMARK))
        digits = rng.integers(1, 10, size=(1024, 81), dtype=np.uint8)
        num_givens = rng.integers(self.config.givens[0], self.config.givens[1] + 1, size=(1024, 1))
        is_given = rng.permuted(np.tile(np.arange(81), (1024, 1)), axis=1) < num_givens
        puzzles = PuzzleSet(digits * is_given, digits)
        return SudokuStream(puzzles, self.config.layout, seed, is_augmented=self.config.augment)

    def validation(self, limit: int) -> CleanBatch:
        return self._examples(self._split[1][:limit])

    def examples_from_file(self, path: Path) -> CleanBatch:
        return self._examples(files.load(path))

    def _examples(self, puzzles: PuzzleSet) -> CleanBatch:
        return encode(_tensor(puzzles.puzzles), _tensor(puzzles.solutions), self.config.layout)

    def prompts(self, lines: Iterable[str], source: str) -> Int[Tensor, "B L"]:
        puzzles, numbers = files.parse_lines(enumerate(lines, start=1), source)
        if not len(puzzles):
            raise UserError(f"{source}: holds no puzzle; give one of 81 symbols on each line")
        solutions = solve(puzzles, limit=1)
        for i in np.flatnonzero(solutions.is_certain & (solutions.count == 0)):
            raise UserError(f"{source}, line {numbers[i]}: the puzzle has no solution")
        clues = _tensor(puzzles)
        return encode(clues, clues, self.config.layout).masked(MASK_ID)

    def grade(self, examples: CleanBatch, tokens: Int[Tensor, "B L"]) -> Grades:
        """`accuracy`: all givens kept and all units right; `exact_match`: and the puzzle has no other solution."""
        puzzles, answers = self._puzzle(examples.masked(MASK_ID)), tokens[:, -81:].cpu().numpy()
        solved = torch.from_numpy(grading.is_solved(puzzles, answers))
        return Grades({"accuracy": solved, "exact_match": solved & torch.from_numpy(grading.has_one_solution(puzzles))})

    def record(self, prompt: Int[Tensor, "L"], tokens: Int[Tensor, "L"]) -> dict[str, Any]:
        puzzle, answer = self._puzzle(prompt[None])[0], board.to_text(tokens[-81:].cpu().numpy())
        return {"puzzle": board.to_text(puzzle), "answer": answer, "solved": grading.reason(puzzle, answer) is None}

    def _puzzle(self, prompts: Int[Tensor, "B L"]) -> NDArray[np.uint8]:
        """The clues (B, 81) of canvases at t = 1: the first 81 cells in both layouts."""
        clues = prompts[:, :81].cpu()
        return torch.where(clues == MASK_ID, 0, clues).numpy().astype(np.uint8)

    def symbol(self, token: int) -> str:
        return "" if token == 0 else str(token)

    def render(self, tokens: Int[Tensor, "L"], is_given: Bool[Tensor, "L"], is_new: Bool[Tensor, "L"]) -> Text:
        """Clues bold, answers green, those of the last step highlighted, and a clue that was changed red."""
        text = Text()
        clues = self._puzzle(torch.where(is_given, tokens, MASK_ID)[None])[0].tolist()
        for cell, (clue, token, fresh) in enumerate(
            zip(clues, tokens[-81:].tolist(), is_new[-81:].tolist(), strict=True)
        ):
            row, column = divmod(cell, 9)
            if column == 0 and row in (3, 6):
                text.append("──────┼───────┼──────\n", style="dim")
            digit = clue if token == MASK_ID else token
            style = "bold red" if clue not in (0, digit) else "bold" if clue else "black on green" if fresh else "green"
            text.append(str(digit) if digit else "·", style=style if digit else "dim")
            text.append("\n" if column == 8 else " │ " if column in (2, 5) else " ", style="dim")
        return text


class SudokuStream:
    """Training examples: shuffled, and each under a random symmetry if `is_augmented`."""

    def __init__(self, puzzles: PuzzleSet, layout: Layout, seed: int, *, is_augmented: bool) -> None:
        self._puzzles, self._solutions = torch.from_numpy(puzzles.puzzles), torch.from_numpy(puzzles.solutions)
        self._layout: Layout = layout
        self._seed = seed
        self._is_augmented = is_augmented

    @property
    def epoch_size(self) -> int:
        return len(self._puzzles)

    def __getitem__(self, number: Int[Tensor, "n"]) -> CleanBatch:
        index = shuffled_index(number, self.epoch_size, self._seed)
        puzzles, solutions = self._puzzles[index].long(), self._solutions[index].long()
        if self._is_augmented:
            puzzles, solutions = augment(puzzles, solutions, number, self._seed)
        return encode(puzzles, solutions, self._layout)


def encode(puzzles: Int[Tensor, "N 81"], solutions: Int[Tensor, "N 81"], layout: Layout) -> CleanBatch:
    """Examples of a layout."""
    if layout == "in_place":
        return CleanBatch(x0=solutions, prompt_mask=puzzles > 0)
    is_clue = torch.ones_like(puzzles, dtype=torch.bool)
    return CleanBatch(x0=torch.cat([puzzles, solutions], dim=1), prompt_mask=torch.cat([is_clue, ~is_clue], dim=1))


def split(puzzles: PuzzleSet, validation_ratio: float, seed: int) -> tuple[PuzzleSet, PuzzleSet]:
    """Training and validation sets that share no puzzle: a keyed hash of it decides, so that copies go together.

    Raises:
        UserError: a set would be empty.
    """
    digits = puzzles.puzzles.reshape(len(puzzles), 9, 9).astype(np.int64) @ 10 ** np.arange(9)  # a row as one number
    key = noise.uniform(seed, Purpose.SPLIT, *torch.from_numpy(digits).unbind(1)).numpy()
    distinct, first = np.unique(key, return_index=True)
    count = round(validation_ratio * len(distinct))
    if not 0 < count < len(distinct):
        raise UserError(
            f"data.validation_ratio={validation_ratio}: of {len(distinct)} distinct puzzles, {count} would be held out;"
            " neither set may be empty"
        )
    return puzzles[key > distinct[count - 1]], puzzles[first[:count]]


def _tensor(boards: NDArray[Any]) -> Int[Tensor, "N 81"]:
    return torch.from_numpy(boards.astype(np.int64))
