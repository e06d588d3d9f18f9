"""Finds what a training starts from: the newest complete checkpoint of its run, or the weights of `train.init`.

And says what is odd about how it starts and ends.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from unmask.config.run import RunConfig
from unmask.errors import UserError
from unmask.formats import to_yaml_line
from unmask.masking.process import MaskingProcess
from unmask.models.lora import has_adapters
from unmask.progress import console, warn
from unmask.tasks.task import Task
from unmask.training import checkpoint
from unmask.training.distributed import check_alike
from unmask.training.evaluating import rates
from unmask.training.folder import RunFolder
from unmask.training.initial import Base, read_base, read_initial_weights
from unmask.training.loading import LoadedRun, open_base
from unmask.training.optim import about_early_end, about_other_length, about_warmup
from unmask.training.trainer import Trainer, num_steps


def newest_step(folder: Path) -> int | None:
    """Returns the step of the newest complete checkpoint in `folder`, or None; sets damaged newer ones aside.

    Raises:
        UserError: there are checkpoints, but all are damaged: to start over would lose what the run has logged.
    """
    checkpoint.put_in_place(folder)
    path = checkpoint.newest(folder, warn)
    if path is None and (steps := checkpoint.steps(folder)):
        raise UserError(
            f"{folder}: no checkpoint is whole (of steps {', '.join(map(str, steps[-5:]))}); bring one back from a "
            "copy, or start another run with --out"
        )
    step = None if path is None else checkpoint.step_of(path)
    checkpoint.set_aside(folder, after=-1 if step is None else step)
    return step


def read_state(path: Path, unread: Collection[str]) -> dict[str, Any]:
    """Reads the state in the checkpoint folder `path`, on every process, with `LazyTensor`s in the sections `unread`.

    Raises:
        UserError: this process does not see what the main process has found.
    """
    try:
        return checkpoint.load(path, unread=unread)
    except FileNotFoundError as error:
        raise UserError(
            f"{path.parent.parent}: the main process has a checkpoint of step {checkpoint.step_of(path)} here, this "
            f"one has not: {error}; put the run where all processes see it"
        ) from error


def check_length(run: RunFolder, most: int) -> None:
    """Checks that a run that is to go on has not gone further already.

    Raises:
        UserError: its newest checkpoint is of a later step than `most`.
    """
    folder = run.checkpoints
    complete = (s for s in checkpoint.steps(folder) if (checkpoint.path_of(folder, s) / checkpoint.COMPLETE).exists())
    step = max(complete, default=0)
    if step > most:
        raise UserError(
            f"train.steps={most}: {run.path} has a checkpoint of step {step}; give {step} or more, or remove "
            f"those after step {most} from a copy of the run"
        )


def check_done(run: RunFolder, config: RunConfig) -> None:
    """Checks that evaluations of a run that is done, and owes none, have the settings that they were made with.

    Raises:
        UserError: they have others, or would go by other names, as `decode` is part of those.
    """
    before = run.before
    if before is not None and (before.eval != config.eval or rates(before) != rates(config)):
        section = "decode" if before.eval == config.eval else "eval"
        raise UserError(
            f"{section}: {run.path} is done, so that other settings would only change what it says of its evaluations; "
            f"leave them as they were, and measure it with `unmask eval {run.path}`"
        )


def about_unused(config: RunConfig) -> str | None:
    """Names the settings that differ from their defaults and have no effect; None if there are none."""
    unused = []
    for key, need in config.without_effect().items():
        section, name = key.split(".")
        own = getattr(config, section)
        if (value := getattr(own, name)) != type(own).model_fields[name].default:
            unused.append(f"{key}={to_yaml_line(value)} (for {need})")
    lists = {key: getattr(config.eval, key) for key in ("orders", "tokens_per_step", "weights")}
    twice = {key: values for key, values in lists.items() if len(set(values)) < len(values)}
    unused += [f"what eval.{key}={to_yaml_line(values)} names again" for key, values in twice.items()]
    return f"without effect: {', '.join(unused)}" if unused else None


def warn_of_settings(trainer: Trainer) -> None:
    """Warns of settings that have no effect, or are at odds with the number of steps."""
    config, of_process = trainer.config, getattr(trainer.process, "about_unused", lambda: None)
    for said in (about_warmup(trainer.num_steps, config.optim), about_unused(config), of_process()):
        if trainer.peers.is_main and said:
            warn(said)


def warn_of_other_length(trainer: Trainer, before: RunConfig | None) -> None:
    """Warns if `trainer`, just restored, is not where a run of its length would be: `before` had another."""
    if before is not None:
        was, now = num_steps(before, trainer.stream), trainer.num_steps
        if said := about_other_length(trainer.step_number, was, now, trainer.config.optim):
            warn(said)


def warn_of_early_end(trainer: Trainer) -> None:
    """Warns if `trainer`, at its end, has not taken the steps that its schedule is for."""
    said = about_early_end(trainer.step_number, trainer.num_steps, trainer.config.optim)
    if trainer.peers.is_main and said:
        warn(said)


def drop_rows(process: MaskingProcess, saved: dict[str, Any]) -> dict[str, Any]:
    """Returns the state `saved` of a pool without its rows, as --restart-pool asks.

    Raises:
        UserError: the process has no pool.
    """
    drop = getattr(process, "drop_rows", None)
    if drop is None:
        raise UserError("--restart-pool: this run's process has no pool; leave it out")
    console.print("The pool is restarted: its rows are dropped, and new examples take their place")
    return drop(saved)


def start_warm(trainer: Trainer, task: Task) -> Base | None:
    """Loads the weights of `train.init`: all, or the base under the adapters, which it returns. Collective.

    Raises:
        UserError: they are not of this model, or differ between processes.
    """
    config, peers, init = trainer.config, trainer.peers, trainer.config.train.init
    if has_adapters(trainer.model):
        with peers.raise_together():
            base = read_base(config, task, open_base)
            trainer.load_base(base)
        check_alike(peers, base.kept())
        return base
    if init is not None:
        with peers.raise_together():
            own = trainer.model.state_dict()
            weights = dict(read_initial_weights(init, task, config.model, own, LoadedRun.open))
        trainer.load_weights(weights)
    return None
