"""Which puzzles a Sudoku task has, and how they are split. Dimensions: N boards."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator

from unmask import cache, noise
from unmask.errors import UserError
from unmask.noise import Purpose
from unmask.section import Section
from unmask.tasks.sudoku import files
from unmask.tasks.sudoku.cache import load_or_generate
from unmask.tasks.sudoku.generator import Difficulty, check_givens
from unmask.tasks.sudoku.puzzles import PuzzleSet


class PuzzleData(Section):
    path: str | None = Field(None, description=".csv, .txt or .npy of puzzles; null = generated")
    puzzles: int = Field(20_000, ge=2, description="how many to generate")
    givens: tuple[int, int] = Field((29, 37), description="fewest and most givens of a generated puzzle (24 to 50)")
    difficulty: Difficulty = Field(
        "singles", description="of generated puzzles: solvable by naked and hidden singles, or harder"
    )
    augment: bool = Field(True, description="a random symmetry for every example drawn")
    validation_ratio: float = Field(0.05, gt=0, lt=1, description="share of the puzzles that is held out")
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


def load(config: PuzzleData, *, with_turns: bool) -> PuzzleSet:
    """The puzzles of a file, or generated ones."""
    if config.path is not None:
        return files.load(Path(config.path).expanduser(), with_turns=with_turns)
    folder = cache.folder(config.cache_dir)
    return load_or_generate(config.puzzles, config.givens, config.difficulty, config.seed, folder)


def synthetic(givens: tuple[int, int], seed: int, *, with_turns: bool) -> PuzzleSet:
    """Random digits with as many clues as `givens` says: not puzzles, but of their shape and cost."""
    rng = np.random.default_rng(noise.integer(seed, Purpose.BENCHMARK))
    digits = rng.integers(1, 10, size=(1024, 81), dtype=np.uint8)
    num_givens = rng.integers(givens[0], givens[1] + 1, size=(1024, 1))
    cells = np.tile(np.arange(81), (1024, 1))
    is_given = rng.permuted(cells, axis=1) < num_givens
    turns = rng.permuted(cells, axis=1).astype(np.uint8) if with_turns else None
    return PuzzleSet(digits * is_given, digits, turns)


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
