"""Sudoku as a masked-diffusion task.

Tokens are the digits 1 to 9, 0 for an empty clue cell, and the mask, 10. Two layouts: `in_place`, 81 tokens, of which
the givens are the prompt; `two_grid`, 162 tokens, 81 clue cells as the prompt and then 81 answer cells (the PUMA
paper's). `BoardTask` is shared with `moves.py`: whatever the tokens, an example is a puzzle with its solution.
Dimensions: N examples or boards, B rows, L positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from pydantic import Field, field_validator
from rich.text import Text
from torch import Tensor

from unmask import files, noise, paths
from unmask.config.settings import OneIsBoth, Section
from unmask.data.fingerprint import DataFingerprint, digest
from unmask.data.stream import shuffled_index
from unmask.errors import UserError
from unmask.files import read_object
from unmask.noise import Purpose
from unmask.tasks.sudoku import board, formats, grading
from unmask.tasks.sudoku.board import Boards, PuzzleSet, Symmetry
from unmask.tasks.sudoku.generator import Difficulty, check_givens, load_or_generate
from unmask.tasks.sudoku.solver import solve
from unmask.tasks.task import DisplayLayout, Grades
from unmask.types import CleanBatch, TokenSpec


class PuzzleData(Section):
    """The settings of the puzzles: a file, or a generator; and their split."""

    needs: ClassVar[dict[str, str]] = {"columns": "path=..", "puzzles": "path=null", "difficulty": "path=null"}

    path: str | None = Field(None, description=".csv, .txt or .npy of puzzles; null = generated")
    columns: tuple[str, str] | None = Field(
        None, description="of a .csv: the names of those of puzzles and solutions; null = as well-known sets name them"
    )
    puzzles: int = Field(20_000, ge=2, description="how many to generate")
    givens: Annotated[tuple[int, int], OneIsBoth] = Field(
        (29, 37), description="fewest and most givens of a generated puzzle (24 to 50)"
    )
    difficulty: Difficulty = Field(
        "singles", description="of generated puzzles: solvable by naked and hidden singles, or harder"
    )
    augment: bool = Field(True, description="a random symmetry for every example drawn")
    validation_ratio: float = Field(0.05, gt=0, lt=1, description="share of the puzzles that is held out")
    seed: int = Field(0, ge=0, description="of the generator and of the split")
    cache_dir: str | None = Field(None, description="null = $UNMASK_CACHE or ~/.cache/unmask")

    @field_validator("columns")
    @classmethod
    def _check_columns(cls, value: tuple[str, str] | None) -> tuple[str, str] | None:
        if value is not None and len(set(value)) < 2:
            raise ValueError("names one column twice; name that of the puzzles and that of the solutions")
        return value

    @field_validator("givens")
    @classmethod
    def _check_givens(cls, value: tuple[int, int]) -> tuple[int, int]:
        check_givens(value)
        return value

    def of_run(self, folder: Path) -> "PuzzleData":
        """Returns the settings with the user's own cache: a run that one was given must not name a place to write."""
        return self.model_copy(update={"cache_dir": None})


def load_puzzles(config: PuzzleData, *, with_turns: bool) -> PuzzleSet:
    """Loads the puzzles of a file, or generated ones."""
    if config.path is not None:
        path = paths.existing_file(config.path, "data.path=")
        return formats.load(path, with_turns=with_turns, columns=config.columns)
    folder = files.cache_folder(config.cache_dir)
    return load_or_generate(config.puzzles, config.givens, config.difficulty, config.seed, folder)


def random_boards(givens: tuple[int, int], seed: int, *, with_turns: bool) -> PuzzleSet:
    """Draws random digits with as many clues as `givens` says: no puzzles, but of their shape and cost."""
    rng = np.random.default_rng(noise.integer(seed, Purpose.BENCHMARK))
    digits = rng.integers(1, 10, size=(1024, 81), dtype=np.uint8)
    num_givens = rng.integers(givens[0], givens[1] + 1, size=(1024, 1))
    cells = np.tile(np.arange(81), (1024, 1))
    is_given = rng.permuted(cells, axis=1) < num_givens
    turns = rng.permuted(cells, axis=1).astype(np.uint8) if with_turns else None
    return PuzzleSet(digits * is_given, digits, turns)


def split_puzzles(puzzles: PuzzleSet, validation_ratio: float, seed: int) -> tuple[PuzzleSet, PuzzleSet]:
    """Splits into training and validation sets that share no puzzle: a keyed hash decides, so copies go together.

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


Encode = Callable[[Int[Tensor, "N 81"], Int[Tensor, "N 81"], Int[Tensor, "N 81"] | None], CleanBatch]
"""Examples from puzzles, solutions and turns."""


class BoardTask(ABC):
    """A Sudoku task; subclasses turn boards into tokens and back."""

    with_turns = False
    """True if the order in which a solver fills the cells is part of an example."""

    def __init__(self, config: PuzzleData, tokens: TokenSpec, canvas: DisplayLayout) -> None:
        self.config = config
        self.tokens = tokens
        self.canvas = canvas

    @abstractmethod
    def encode(
        self, puzzles: Int[Tensor, "N 81"], solutions: Int[Tensor, "N 81"], turns: Int[Tensor, "N 81"] | None = None
    ) -> CleanBatch:
        """Makes examples. `turns` is None if they are unknown, or `with_turns` is False."""

    @abstractmethod
    def clues(self, prompts: Int[Tensor, "B L"]) -> Boards:
        """Reads the puzzles (B, 81) off canvases at t = 1."""

    @abstractmethod
    def answers(self, tokens: Int[Tensor, "B L"]) -> Boards:
        """Reads the boards (B, 81) off canvases; 0 for no digit, `mask_id` for a cell that is a masked token."""

    @cached_property
    def _split(self) -> tuple[PuzzleSet, PuzzleSet, DataFingerprint]:
        """Training puzzles, held-out ones, and the fingerprint of both."""
        puzzles, config = self._load(), self.config
        train, held_out = split_puzzles(puzzles, config.validation_ratio, config.seed)
        tables = [table for table in (puzzles.puzzles, puzzles.solutions, puzzles.turns) if table is not None]
        return (
            train,
            held_out,
            DataFingerprint(
                rows=len(puzzles),
                bytes=sum(table.nbytes for table in tables),
                held_out=len(held_out),
                split=f"data.validation_ratio={config.validation_ratio} and data.seed={config.seed}",
                sha256=digest(*tables),
            ),
        )

    def data_fingerprint(self) -> DataFingerprint:
        """Returns what identifies the puzzles and those of them that are held out."""
        return self._split[2]

    def _load(self) -> PuzzleSet:
        return load_puzzles(self.config, with_turns=self.with_turns)

    def train_stream(self, seed: int) -> "BoardStream":
        return self._stream(self._split[0], seed)

    def synthetic_stream(self, seed: int) -> "BoardStream":
        """Streams random digits with as many clues as `data.givens` says: no puzzles, but of their shape and cost."""
        return self._stream(random_boards(self.config.givens, seed, with_turns=self.with_turns), seed)

    def _stream(self, puzzles: PuzzleSet, seed: int) -> "BoardStream":
        return BoardStream(puzzles, self.encode, seed, is_augmented=self.config.augment)

    def validation(self, limit: int) -> CleanBatch:
        return self._examples(self._split[1][:limit])

    def examples_from_file(self, path: Path) -> CleanBatch:
        columns = self.config.columns
        return self._examples(formats.load(path, with_turns=self.with_turns, columns=columns, is_other=True))

    def _examples(self, puzzles: PuzzleSet) -> CleanBatch:
        turns = None if puzzles.turns is None else _tensor(puzzles.turns)
        return self.encode(_tensor(puzzles.puzzles), _tensor(puzzles.solutions), turns)

    def prompts(self, lines: Iterable[str], source: str) -> Int[Tensor, "B L"]:
        """Reads prompts: each line is 81 symbols, or a JSON object with such a `puzzle`."""
        texts = ((i, _read_puzzle(line, f"{source}, line {i}")) for i, line in enumerate(lines, start=1))
        puzzles, numbers = formats.parse_lines(texts, source)
        if not len(puzzles):
            raise UserError(f"{source}: holds no puzzle; give one of 81 symbols on each line")
        solutions = solve(puzzles, limit=1)
        for i in np.flatnonzero(solutions.is_certain & (solutions.count == 0)):
            raise UserError(f"{source}, line {numbers[i]}: the puzzle has no solution")
        clues = _tensor(puzzles)
        return self.encode(clues, clues).masked(self.tokens.mask_id)

    def grade(self, examples: CleanBatch, tokens: Int[Tensor, "B L"]) -> Grades:
        """Grades `accuracy`: all givens kept, all units right; `exact_match`: and the puzzle has no other solution."""
        puzzles = self.clues(examples.masked(self.tokens.mask_id))
        solved = torch.from_numpy(grading.is_solved(puzzles, self.answers(tokens)))
        return Grades({"accuracy": solved, "exact_match": solved & torch.from_numpy(grading.has_one_solution(puzzles))})

    def record(self, prompt: Int[Tensor, "L"], tokens: Int[Tensor, "L"]) -> dict[str, Any]:
        puzzle, answer = self.clues(prompt[None])[0], board.to_text(self.answers(tokens[None])[0])
        return {
            "puzzle": board.to_text(puzzle),
            "answer": answer,
            "solved": grading.find_reason(puzzle, answer) is None,
        }

    def render(self, tokens: Int[Tensor, "L"], is_given: Bool[Tensor, "L"], is_new: Bool[Tensor, "L"]) -> Text:
        """Renders clues bold, answers green, those of the last step highlighted, and a clue that was changed red."""
        mask_id = self.tokens.mask_id
        clues = self.clues(torch.where(is_given, tokens, mask_id)[None])[0]
        now, before = self.answers(torch.stack([tokens, torch.where(is_new, mask_id, tokens)]))
        return _render_board(clues, np.where(now == mask_id, clues, now), now != before)


class BoardStream:
    """The training examples: shuffled, and each under a random symmetry if `is_augmented`."""

    def __init__(self, puzzles: PuzzleSet, encode: Encode, seed: int, *, is_augmented: bool) -> None:
        self._puzzles, self._solutions = torch.from_numpy(puzzles.puzzles), torch.from_numpy(puzzles.solutions)
        self._turns = None if puzzles.turns is None else torch.from_numpy(puzzles.turns)
        self._encode = encode
        self._seed = seed
        self._is_augmented = is_augmented

    @property
    def epoch_size(self) -> int:
        return len(self._puzzles)

    def __getitem__(self, number: Int[Tensor, "n"]) -> CleanBatch:
        index = shuffled_index(number, self.epoch_size, self._seed)
        puzzles, solutions = self._puzzles[index].long(), self._solutions[index].long()
        turns = None if self._turns is None else self._turns[index].long()
        if self._is_augmented:
            symmetry = Symmetry.draw(number, self._seed)
            puzzles, solutions = symmetry.apply(puzzles), symmetry.apply(solutions)
            turns = None if turns is None else symmetry.move(turns)
        return self._encode(puzzles, solutions, turns)


def _read_puzzle(line: str, where: str) -> str:
    if not line.lstrip().startswith("{"):
        return line
    puzzle = read_object(line, where).get("puzzle")
    if not isinstance(puzzle, str) or not puzzle.strip():
        raise UserError(f"{where}: needs the string `puzzle`")
    return puzzle


def _render_board(clues: NDArray[np.uint8], digits: NDArray[np.uint8], is_new: NDArray[np.bool_]) -> Text:
    """Renders a board (81,) for the terminal."""
    text = Text()
    for cell, (clue, digit, fresh) in enumerate(zip(clues.tolist(), digits.tolist(), is_new.tolist(), strict=True)):
        row, column = divmod(cell, 9)
        if column == 0 and row in (3, 6):
            text.append("──────┼───────┼──────\n", style="dim")
        style = "bold red" if clue not in (0, digit) else "bold" if clue else "black on green" if fresh else "green"
        text.append(str(digit) if digit else "·", style=style if digit else "dim")
        text.append("\n" if column == 8 else " │ " if column in (2, 5) else " ", style="dim")
    return text


def _tensor(boards: NDArray[Any]) -> Int[Tensor, "N 81"]:
    return torch.from_numpy(boards.astype(np.int64))


GridLayout = Literal["in_place", "two_grid"]
MASK_ID = 10


class SudokuData(PuzzleData):
    """The settings of `Sudoku`."""

    layout: GridLayout = Field(
        "in_place", description="81 tokens (the givens are the prompt), or 162 (clues, then answers)"
    )


class Sudoku(BoardTask):
    """Sudoku whose answer is a grid: `in_place` over the puzzle, or beside it (`two_grid`)."""

    Config = SudokuData

    def __init__(self, config: SudokuData) -> None:
        self.layout: GridLayout = config.layout
        length = 81 if config.layout == "in_place" else 162
        super().__init__(
            config,
            TokenSpec(vocab_size=MASK_ID + 1, length=length, mask_id=MASK_ID),
            DisplayLayout(columns=9, start=length - 81, box=3, clue_start=None if length == 81 else 0),
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
