"""What the Sudoku tasks share: whatever their tokens, an example is a puzzle with its solution.

Dimensions: N examples, B rows, L positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from rich.text import Text
from torch import Tensor

from unmask.data.stream import shuffled_index
from unmask.errors import UserError
from unmask.jsonl import parse_object
from unmask.tasks.sudoku import board, data, files, grading
from unmask.tasks.sudoku.board import Boards
from unmask.tasks.sudoku.data import PuzzleData
from unmask.tasks.sudoku.puzzles import PuzzleSet
from unmask.tasks.sudoku.solver import solve
from unmask.tasks.sudoku.symmetry import Symmetry
from unmask.tasks.task import Canvas, Grades
from unmask.types import CleanBatch, TokenSpec

Encode = Callable[[Int[Tensor, "N 81"], Int[Tensor, "N 81"], Int[Tensor, "N 81"] | None], CleanBatch]
"""Examples from puzzles, solutions and turns."""


class BoardTask(ABC):
    """A task of Sudoku: how boards become tokens and tokens boards is up to its subclasses."""

    with_turns = False
    """Whether the order in which a solver fills the cells is part of an example."""

    def __init__(self, config: PuzzleData, tokens: TokenSpec, canvas: Canvas) -> None:
        self.config = config
        self.tokens = tokens
        self.canvas = canvas

    @abstractmethod
    def encode(
        self, puzzles: Int[Tensor, "N 81"], solutions: Int[Tensor, "N 81"], turns: Int[Tensor, "N 81"] | None = None
    ) -> CleanBatch:
        """Examples. `turns` is None where nobody knows them, or `with_turns` is False."""

    @abstractmethod
    def clues(self, prompts: Int[Tensor, "B L"]) -> Boards:
        """The puzzles (B, 81) of canvases at t = 1."""

    @abstractmethod
    def answers(self, tokens: Int[Tensor, "B L"]) -> Boards:
        """The boards (B, 81) that canvases tell; 0 for no digit, `mask_id` for a cell that is a masked token."""

    @cached_property
    def _split(self) -> tuple[PuzzleSet, PuzzleSet]:
        return data.split(self._load(), self.config.validation_ratio, self.config.seed)

    def _load(self) -> PuzzleSet:
        return data.load(self.config, with_turns=self.with_turns)

    def train_stream(self, seed: int) -> "BoardStream":
        return self._stream(self._split[0], seed)

    def synthetic_stream(self, seed: int) -> "BoardStream":
        """Random digits with as many clues as `data.givens` says: not puzzles, but of their shape and cost."""
        return self._stream(data.synthetic(self.config.givens, seed, with_turns=self.with_turns), seed)

    def _stream(self, puzzles: PuzzleSet, seed: int) -> "BoardStream":
        return BoardStream(puzzles, self.encode, seed, is_augmented=self.config.augment)

    def validation(self, limit: int) -> CleanBatch:
        return self._examples(self._split[1][:limit])

    def examples_from_file(self, path: Path) -> CleanBatch:
        return self._examples(files.load(path, with_turns=self.with_turns))

    def _examples(self, puzzles: PuzzleSet) -> CleanBatch:
        turns = None if puzzles.turns is None else _tensor(puzzles.turns)
        return self.encode(_tensor(puzzles.puzzles), _tensor(puzzles.solutions), turns)

    def prompts(self, lines: Iterable[str], source: str) -> Int[Tensor, "B L"]:
        """Each line 81 symbols, or a JSON object with such a `puzzle`."""
        texts = ((i, _puzzle(line, f"{source}, line {i}")) for i, line in enumerate(lines, start=1))
        puzzles, numbers = files.parse_lines(texts, source)
        if not len(puzzles):
            raise UserError(f"{source}: holds no puzzle; give one of 81 symbols on each line")
        solutions = solve(puzzles, limit=1)
        for i in np.flatnonzero(solutions.is_certain & (solutions.count == 0)):
            raise UserError(f"{source}, line {numbers[i]}: the puzzle has no solution")
        clues = _tensor(puzzles)
        return self.encode(clues, clues).masked(self.tokens.mask_id)

    def grade(self, examples: CleanBatch, tokens: Int[Tensor, "B L"]) -> Grades:
        """`accuracy`: all givens kept and all units right; `exact_match`: and the puzzle has no other solution."""
        puzzles = self.clues(examples.masked(self.tokens.mask_id))
        solved = torch.from_numpy(grading.is_solved(puzzles, self.answers(tokens)))
        return Grades({"accuracy": solved, "exact_match": solved & torch.from_numpy(grading.has_one_solution(puzzles))})

    def record(self, prompt: Int[Tensor, "L"], tokens: Int[Tensor, "L"]) -> dict[str, Any]:
        puzzle, answer = self.clues(prompt[None])[0], board.to_text(self.answers(tokens[None])[0])
        return {"puzzle": board.to_text(puzzle), "answer": answer, "solved": grading.reason(puzzle, answer) is None}

    def render(self, tokens: Int[Tensor, "L"], is_given: Bool[Tensor, "L"], is_new: Bool[Tensor, "L"]) -> Text:
        """Clues bold, answers green, those of the last step highlighted, and a clue that was changed red."""
        mask_id = self.tokens.mask_id
        clues = self.clues(torch.where(is_given, tokens, mask_id)[None])[0]
        now, before = self.answers(torch.stack([tokens, torch.where(is_new, mask_id, tokens)]))
        return _render(clues, np.where(now == mask_id, clues, now), now != before)


class BoardStream:
    """Training examples: shuffled, and each under a random symmetry if `is_augmented`."""

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


def _puzzle(line: str, where: str) -> str:
    if not line.lstrip().startswith("{"):
        return line
    try:
        puzzle = parse_object(line).get("puzzle")
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if not isinstance(puzzle, str) or not puzzle.strip():
        raise UserError(f"{where}: needs the string `puzzle`")
    return puzzle


def _render(clues: NDArray[np.uint8], digits: NDArray[np.uint8], is_new: NDArray[np.bool_]) -> Text:
    """A board (81,) for the terminal."""
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
