"""From a configuration to its task, and to what of it goes along with a run."""

from pathlib import Path

from unmask.config import RunConfig
from unmask.errors import UserError
from unmask.registry import resolve
from unmask.tasks.task import Task


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
