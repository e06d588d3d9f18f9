"""Generated puzzles, kept on disk."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np

from unmask import durable
from unmask.cache import held
from unmask.errors import UserError
from unmask.progress import console, progress
from unmask.tasks.sudoku.generator import Difficulty, generate
from unmask.tasks.sudoku.puzzles import PuzzleSet

_VERSION = 1  # of the generator: another one makes other puzzles from the same seed


def load_or_generate(count: int, givens: tuple[int, int], difficulty: Difficulty, seed: int, folder: Path) -> PuzzleSet:
    """The puzzles of these settings, from the cache or newly generated (the first process does, others wait for it)."""
    settings = {"count": count, "givens": givens, "difficulty": difficulty, "seed": seed, "version": _VERSION}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / "sudoku" / f"{difficulty}_{givens[0]}-{givens[1]}_{count}_{digest}.npy"
    with held(path):
        if not path.exists():
            with progress(
                f"Generating {count} puzzles ({difficulty}, {givens[0]}-{givens[1]} givens)", count
            ) as update:
                puzzles, solutions = generate(
                    count, givens=givens, difficulty=difficulty, seed=seed, on_progress=update
                )
            durable.write(path, _to_bytes(np.concatenate([puzzles, solutions], axis=1)))
            console.print(f"Puzzles kept in {path}")
    try:
        boards = np.load(path)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: damaged: {error}; delete it, and it will be made again") from error
    return PuzzleSet(boards[:, :81], boards[:, 81:])


def _to_bytes(boards: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, boards)
    return buffer.getvalue()
