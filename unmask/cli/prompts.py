"""Reads the prompts to decode: from a file, from stdin, or from a line that was typed.

Dimensions: B prompts, b rows of a batch, L positions.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from unmask import paths
from unmask.cli.session import DecodeSession
from unmask.errors import UserError
from unmask.files import parse_object
from unmask.progress import console
from unmask.tasks.task import Task

_SEEDS = 2**32


@dataclass(frozen=True)
class Prompts:
    """The canvases to fill in."""

    canvases: Int[Tensor, "B L"]
    keys: Int[Tensor, "B"]
    """Key of each prompt's noise: its own `seed`, or its number, from 0."""
    places: list[str]
    """Place of each prompt, for messages: `FILE, line 3`."""

    def rows(self, num_samples: int, batch_size: int, start: int = 0) -> Iterator["PromptBatch"]:
        """Yields every prompt `num_samples` times, in batches; `start` is the first row of them."""
        total = len(self.canvases) * num_samples
        for first in range(start, total, batch_size):
            row = torch.arange(first, min(first + batch_size, total))
            number, sample = row // num_samples, row % num_samples
            yield PromptBatch(self.canvases[number], self.keys[number] + sample * _SEEDS, sample)

    def check(self, session: DecodeSession) -> None:
        """Checks, before any work, that the session can finish every prompt.

        Raises:
            UserError: it cannot finish one; the message names its place.
        """
        for canvas, place in zip(self.canvases, self.places, strict=True):
            try:
                session.check(canvas[None])
            except UserError as error:
                raise UserError(f"{place}: {error}") from error


@dataclass(frozen=True)
class PromptBatch:
    """A batch of prompts, each with the key of its noise and the number of its sample."""

    canvases: Int[Tensor, "b L"]
    keys: Int[Tensor, "b"]
    """Keys of the noise: for sample 0 the prompt's own. Each sample of a prompt has a key of its own."""
    samples: Int[Tensor, "b"]


def read(task: Task, file: str) -> Prompts:
    """Reads the prompts of a file; `-` is stdin."""
    if file != "-":
        return parse(task, paths.read_input(file).split("\n"), file)
    if sys.stdin.isatty():
        console.print("Reading prompts from the terminal: one a line, Ctrl-D to end")
    return parse(task, list(paths.stdin_lines()), "stdin")


def parse(task: Task, lines: Iterable[str], source: str) -> Prompts:
    """Parses the prompts in `lines`, one for each line that is not empty.

    Raises:
        UserError: the task cannot read a prompt, or its `seed` is wrong.
    """
    lines = list(lines)
    places = [f"{source}, line {number}" for number, line in enumerate(lines, 1) if line.strip()]
    canvases = task.prompts(lines, source)
    given = [_seed(line, place) for line, place in zip(filter(str.strip, lines), places, strict=True)]
    keys = [number if seed is None else seed for number, seed in enumerate(given)]
    return Prompts(canvases, torch.tensor(keys), places)


def _seed(line: str, place: str) -> int | None:
    """Returns the `seed` of a prompt that is a JSON object; None if there is none."""
    if not line.lstrip().startswith("{"):
        return None
    try:
        seed = parse_object(line).get("seed")
    except ValueError:
        return None  # the task may still read such a line as text
    if seed is not None and not (type(seed) is int and 0 <= seed < _SEEDS):
        raise UserError(f"{place}: seed={json.dumps(seed)[:40]}: must be a whole number from 0 to {_SEEDS - 1}")
    return seed
