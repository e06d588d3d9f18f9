"""The protocols of tasks, and the task of a configuration. Dimensions: B rows, L positions."""

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Int
from rich.console import RenderableType
from torch import Tensor

from unmask.config.registry import build, require_parts, resolve
from unmask.config.run import RunConfig
from unmask.data.fingerprint import DataFingerprint
from unmask.data.stream import EpochStream
from unmask.data.vocabulary import Vocabulary
from unmask.errors import UserError
from unmask.types import CleanBatch, TokenSpec


@dataclass(frozen=True)
class DisplayLayout:
    """The layout of the positions from `start` on, for display: rows of `columns`, ruled every `box` (0: never).

    `clue_start` is where the clues of these cells begin, if those are positions of their own; a blank clue has the
    symbol "".
    """

    columns: int
    start: int = 0
    box: int = 0
    clue_start: int | None = None
    is_text: bool = False
    """True if symbols are pieces of text, of different widths."""


@dataclass(frozen=True)
class Grades:
    """The grades of B examples: True where one is right."""

    measures: dict[str, Bool[Tensor, "B"]]
    """By name, on the CPU; `accuracy`, the first, is the one that counts."""
    details: list[dict[str, Any]] | None = None
    """More about each example, as JSON objects."""
    is_graded: Bool[Tensor, "B"] | None = None
    """False where the machine could not grade an answer, which then counts in no share; None: all are graded."""
    groups: list[str] | None = None
    """The kind that each example is of, by which an evaluation shows `accuracy` as well."""


@dataclass(frozen=True)
class Extent:
    """The amount of maskable text in examples: tokens up to the end, and the bytes that they stand for."""

    tokens: int
    bytes: int
    rows: str
    """The way it was cut: `wrap` or `document`. Perplexities of the two cannot be compared."""


@runtime_checkable
class Task(Protocol):
    """A task: its data, and their display.

    A class that is named in `task.name` also has `Config`, a pydantic model of the `data` section, and
    `from_config(config)`. Data are read or made when they are first used. It may have `keep_files(folder)`, which
    copies files that decoding needs into the folder of a run, where `Config.of_run` finds them, and returns the
    settings of `data` that an export then has in place of its own, if any; `original_ids`, the ids that its tokens have
    in the tokenizer of a Hugging Face checkpoint (None: a new one), for `train.init`; `data_fingerprint()`, what
    identifies its data, so that a run notices when they are others (`data/fingerprint.py`); `text(tokens)`, a canvas
    (L,) as text, and `token(text)`, the id of the one token that is written so (`UserError` if there is none; default:
    the token of that `symbol`); and `has_turns = True`, if a prompt may be a JSON object whose `messages` are a
    conversation, which `unmask chat` then keeps. A task with right answers is a `GradedTask`; running text is a
    `TextTask`.
    """

    tokens: TokenSpec
    canvas: DisplayLayout

    def train_stream(self, seed: int) -> EpochStream:
        """Streams the training examples, shuffled and, where the task can, augmented by `seed`."""
        ...

    def synthetic_stream(self, seed: int) -> EpochStream:
        """Streams random tokens in the shape of the training examples: for benchmarks, which need no data."""
        ...

    def validation(self, limit: int) -> CleanBatch:
        """Returns up to `limit` held-out examples, always the same ones."""
        ...

    def examples_from_file(self, path: Path) -> CleanBatch:
        """Reads examples to evaluate on. Raises `UserError` with file and line where they are wrong."""
        ...

    def prompts(self, lines: Iterable[str], source: str) -> Int[Tensor, "B L"]:
        """Reads canvases to decode, one per non-empty line, `mask_id` where something is to be filled in."""
        ...

    def record(self, prompt: Int[Tensor, "L"], tokens: Int[Tensor, "L"]) -> dict[str, Any]:
        """Describes one decoded prompt as a JSON object."""
        ...

    def symbol(self, token: int) -> str:
        """Formats a token for display."""
        ...

    def render(
        self, tokens: Int[Tensor, "L"], is_given: Bool[Tensor, "L"], is_new: Bool[Tensor, "L"]
    ) -> RenderableType:
        """Renders a canvas for the terminal."""
        ...


@runtime_checkable
class GradedTask(Task, Protocol):
    """A task whose answers are right or wrong. Others are evaluated by likelihood alone."""

    def grade(self, examples: CleanBatch, tokens: Int[Tensor, "B L"]) -> Grades:
        """Grades finished canvases."""
        ...


@runtime_checkable
class TextTask(Task, Protocol):
    """A task of running text, without questions and answers."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the ids."""
        ...

    def extent(self, examples: CleanBatch) -> Extent:
        """Measures the text in examples."""
        ...

    def corpus(self, path: Path, limit: int | None = None) -> CleanBatch:
        """Reads up to `limit` rows of any text, cut as the task's own. Raises `UserError` if there are none."""
        ...

    def documents(self, tokens: Int[Tensor, "L"], is_own: Bool[Tensor, "L"]) -> list[list[int]]:
        """Splits a finished row into documents: its ids where `is_own`, without ends and padding."""
        ...


def build_task(config: RunConfig) -> Task:
    """Builds the task named `task.name`.

    Raises:
        UserError: its code fails, or it lacks a part of the protocol `Task`.
    """
    task: Task = build("task", config.task.name, config.data)
    require_parts("task", config.task.name, task, Task)
    return task


_may_change: ContextVar[bool] = ContextVar("data_may_change", default=False)


def accept_changed_data() -> None:
    """Allows data other than those that a run began with, in this context from now on (one command, say)."""
    _may_change.set(True)


def may_change() -> bool:
    """True if `accept_changed_data` was called in this context."""
    return _may_change.get()


def fingerprint_of(task: Task) -> DataFingerprint | None:
    """Returns what identifies the task's data; None for a task that does not say."""
    own = getattr(task, "data_fingerprint", None)
    return None if own is None else own()


def check_same_data(task: Task, config: RunConfig, kept: DataFingerprint | None, run: Path, fix: str) -> None:
    """Checks that the task's data are those that `run` began with, as `kept` tells.

    Nothing is checked where the run keeps no fingerprint, as those from before, or where `accept_changed_data` was
    called.

    Raises:
        UserError: they are others.
    """
    found = None if kept is None or may_change() else fingerprint_of(task)
    if kept is None or found is None or found == kept:
        return
    path = getattr(config.data, "path", None)
    raise UserError(
        f"{'the data' if path is None else f'data.path={path}'}: not what {run} began with: {kept.differences(found)}. "
        f"What it has trained on may now be held out; {fix}; to go on with these all the same: --data-changed"
    )


def is_graded(config: RunConfig) -> bool:
    """True if the task named `task.name` grades answers (`GradedTask`)."""
    return hasattr(resolve("task", config.task.name), "grade")


def keep_files(task: Task, folder: Path) -> dict[str, Any]:
    """Copies the task's files that decoding needs, such as a tokenizer, into the folder of a run or an export.

    Returns:
        The settings of `data` that an export has in place of its own, such as no path of a tokenizer.
    """
    keep = getattr(task, "keep_files", None)
    return {} if keep is None else keep(folder) or {}
