"""Opens runs and their tasks, and prints a result with its protocol, for all kinds of `unmask eval`."""

from collections.abc import Sequence
from typing import Any, cast

from unmask import formats
from unmask.cli import options
from unmask.config.registry import found_in, resolve
from unmask.config.run import RunConfig
from unmask.config.settings import check_section
from unmask.errors import UserError
from unmask.evaluation.evaluate import Cells
from unmask.tasks.code import CodeTask
from unmask.tasks.programs.problems import BENCHMARKS
from unmask.tasks.task import Task, build_task
from unmask.training.loading import LoadedRun
from unmask.training.protocol import EvalOptions, Repeated


def open_run(asked: EvalOptions, run: str | None = None) -> LoadedRun:
    """Opens the run that is evaluated, or another one as it is."""
    return LoadedRun.open(run or asked.run, weights=asked.weights, step=asked.step, device=asked.device)


def task_of(loaded: LoadedRun, task: str | None) -> tuple[RunConfig, Task]:
    """Returns the task that examples are read and graded with, and the run's configuration with it.

    Raises:
        UserError: there is no such task, its data are wrong, or it has other tokens than the run's model.
    """
    if task in BENCHMARKS:
        return loaded.config, cast(Task, CodeTask(loaded.task, task))
    if task is None:
        return loaded.config, build_task(loaded.config)
    config = _with_task(loaded, task)
    built = build_task(config)
    if (own := built.tokens.vocab_size) != loaded.tokens.vocab_size:
        raise UserError(
            f"--task {task}: has other tokens ({own} ids) than {loaded.path}, a run of task.name="
            f"{loaded.config.task.name} ({loaded.tokens.vocab_size} ids); leave it out, or name a run of such tokens"
        )
    return config, built


def _with_task(loaded: LoadedRun, task: str) -> RunConfig:
    """Returns the run's configuration with its data settings read as those of `task`."""
    config, section = loaded.config, resolve("task", task, "--task").Config
    given = {key: value for key, value in config.data.model_dump().items() if key in section.model_fields}
    choice = config.task.model_copy(update={"name": task})
    with found_in(loaded.path):
        data = check_section(section, given, f"--task {task}: data").of_run(loaded.path)
    return config.model_copy(update={"task": choice, "data": data})


def print_evaluation(result: dict[str, Any], protocol: dict[str, Any], repeated: Repeated | None) -> None:
    """Prints an evaluation as JSON, with its protocol, and with what differs from the one that is `repeated`."""
    found = {}
    if repeated is not None:
        found["repeats"] = {
            "file": str(repeated.file),
            "differs": repeated.differences(protocol),
            "figures": repeated.figures(result),
        }
    options.print_json(result | found | {"protocol": protocol})


def print_repeated(result: dict[str, Any], protocol: dict[str, Any], repeated: Repeated | None) -> None:
    """Prints what differs from the evaluation that is `repeated`, and the figures of both."""
    if repeated is None:
        return
    out = options.results()
    differs, figures = repeated.differences(protocol), repeated.figures(result)
    out.print(f"Repeats {repeated.file}" + (", but for:" if differs else ", with nothing changed."))
    for key, (then, now) in differs.items():
        out.print(f"  {key}: {formats.printable(str(then))} then, {formats.printable(str(now))} now")
    if figures:
        rows: list[Sequence[str]] = [(key, *map(_shown, both)) for key, both in figures.items()]
        out.print(options.table(Cells(("figure", "then", "now"), rows)))


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
