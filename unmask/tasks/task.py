"""The contract between a task and the rest. Dimensions: B rows, L positions.

From a configuration to its task, and to what of it goes along with a run.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Int
from rich.console import RenderableType
from torch import Tensor

from unmask.config.registry import resolve
from unmask.config.run import RunConfig
from unmask.data.stream import EpochStream
from unmask.data.vocabulary import Vocabulary
from unmask.errors import UserError
from unmask.types import CleanBatch, TokenSpec


@dataclass(frozen=True)
class DisplayLayout:
    """How the positions from `start` on are laid out for a reader: rows of `columns`, ruled every `box` (0: not).

    `clue_start` is where the clues of these cells begin, if those are positions of their own; a blank clue has the
    symbol "".
    """

    columns: int
    start: int = 0
    box: int = 0
    clue_start: int | None = None
    is_text: bool = False
    """Whether symbols are pieces of text, of different widths."""


@dataclass(frozen=True)
class Grades:
    """Which of B examples are right."""

    measures: dict[str, Bool[Tensor, "B"]]
    """By name, on the CPU; `accuracy`, the first, is the one that counts."""
    details: list[dict[str, Any]] | None = None
    """What else there is to say of each, as JSON objects."""


@dataclass(frozen=True)
class Extent:
    """How much text examples hold where it can be masked: tokens up to the end, and the bytes that they stand for."""

    tokens: int
    bytes: int
    rows: str
    """How it was cut: `wrap` or `document`. Perplexities of the two cannot be compared."""


@runtime_checkable
class Task(Protocol):
    """Data, and how people read it.

    A class that is named in `task.name` also has `Config`, a pydantic model of the `data` section, and
    `from_config(config)`. Reading or making the data waits until it is asked for. It may have `keep_files(folder)`,
    which copies files that decoding needs into the folder of a run, where `Config.of_run` finds them; `original_ids`,
    the ids that its tokens have in the tokenizer of a Hugging Face checkpoint (None: a new one), for `train.init`;
    `text(tokens)`, a canvas (L,) as text, and `token(text)`, the id of the one token that is written so (`UserError` if
    there is none), unless that is what its `symbol` says. What can be solved has `grade`: `GradedTask`. Running text is
    a `TextTask`.
    """

    tokens: TokenSpec
    canvas: DisplayLayout

    def train_stream(self, seed: int) -> EpochStream:
        """The training examples, shuffled and, where the task can, augmented by `seed`."""
        ...

    def synthetic_stream(self, seed: int) -> EpochStream:
        """Random tokens in the shape of the training examples: for benchmarks, which need no data."""
        ...

    def validation(self, limit: int) -> CleanBatch:
        """Up to `limit` held-out examples, always the same ones."""
        ...

    def examples_from_file(self, path: Path) -> CleanBatch:
        """Examples to evaluate on. Raises `UserError` with file and line where they are wrong."""
        ...

    def prompts(self, lines: Iterable[str], source: str) -> Int[Tensor, "B L"]:
        """Canvases to decode, one per non-empty line, `mask_id` where something is to be filled in."""
        ...

    def record(self, prompt: Int[Tensor, "L"], tokens: Int[Tensor, "L"]) -> dict[str, Any]:
        """One decoded prompt as a JSON object."""
        ...

    def symbol(self, token: int) -> str:
        """A token for a reader."""
        ...

    def render(
        self, tokens: Int[Tensor, "L"], is_given: Bool[Tensor, "L"], is_new: Bool[Tensor, "L"]
    ) -> RenderableType:
        """A canvas for the terminal."""
        ...


@runtime_checkable
class GradedTask(Task, Protocol):
    """A task whose answers are right or wrong. Of others an evaluation takes the likelihood alone."""

    def grade(self, examples: CleanBatch, tokens: Int[Tensor, "B L"]) -> Grades:
        """What is right about finished canvases."""
        ...


@runtime_checkable
class TextTask(Task, Protocol):
    """Running text: nothing is asked, and a row is as likely as any other of its kind."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What the ids mean."""
        ...

    def extent(self, examples: CleanBatch) -> Extent:
        """How much text they hold."""
        ...

    def corpus(self, path: Path, limit: int | None = None) -> CleanBatch:
        """Up to `limit` rows of any text, tokenised and cut as the task's own. Raises `UserError` if it has none."""
        ...

    def documents(self, tokens: Int[Tensor, "L"], is_own: Bool[Tensor, "L"]) -> list[list[int]]:
        """The ids of a finished row where `is_own`, without ends and padding, document by document."""
        ...


def build_task(config: RunConfig) -> Task:
    """The task that `task.name` stands for.

    Raises:
        UserError: it lacks a part of the protocol `Task`.
    """
    task = resolve("task", config.task.name).from_config(config.data)
    if not isinstance(task, Task):
        raise UserError(f"task.name={config.task.name}: lacks part of the protocol `Task`")
    return task


def is_graded(config: RunConfig) -> bool:
    """Whether the task that `task.name` stands for can say what is right (`GradedTask`)."""
    return hasattr(resolve("task", config.task.name), "grade")


def keep_files(task: Task, folder: Path) -> None:
    """Puts what decoding needs of the task's files, a tokenizer for instance, into the folder of a run or an export."""
    keep = getattr(task, "keep_files", None)
    if keep is not None:
        keep(folder)
