"""Finds what a training starts from: its newest complete checkpoint, or the weights of another model."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmask import paths
from unmask.config.run import RunConfig
from unmask.config.settings import Section
from unmask.errors import UserError
from unmask.masking.process import MaskingProcess
from unmask.models import hf
from unmask.models.hf_weights import read_weights
from unmask.models.transformer import Transformer, TransformerConfig
from unmask.progress import console, warn
from unmask.tasks.task import Task
from unmask.training import checkpoint, state
from unmask.training.hf_tokens import with_own_mask
from unmask.training.loading import LoadedRun
from unmask.training.optim import about_other_length
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


def warn_of_other_length(trainer: Trainer, before: RunConfig | None) -> None:
    """Warns if `trainer`, just restored, is not where a run of its length would be: `before` had another."""
    if before is not None:
        was, now = num_steps(before, trainer.stream), trainer.num_steps
        if said := about_other_length(trainer.step_number, was, now, trainer.config.optim):
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


def read_initial_weights(source: str, task: Task, settings: Section, model: nn.Module) -> dict[str, Tensor]:
    """Reads the state of `model`, which has these `settings`, from a run, an export or a Hugging Face folder.

    Tensors that start at 0, and the bias after attention, may be missing there: they are 0 then.

    Raises:
        UserError: `source` is none of them, or is of another vocabulary or shape; the message says which.
    """
    folder = paths.user_path(source, "train.init=")
    weights = _from_hugging_face(folder, task, settings) if hf.is_checkpoint(folder) else _from_run(source, task)
    own = model.state_dict()
    may_be_missing = (*Transformer.STARTS_AT_ZERO, "attention.out.bias")  # a model without them has 0 there
    weights = {name: torch.zeros_like(own[name]) for name in own if name.endswith(may_be_missing)} | weights
    same_format = {
        name: value.to(own[name].dtype) if name in own and value.is_floating_point() else value
        for name, value in weights.items()
    }
    if named := state.differences(own, same_format):
        raise UserError(
            f"train.init={source}: its model differs from this one: {named}; set `model` as it has it, or name another"
        )
    for name, value in weights.items():
        if found := state.not_finite(value):
            raise UserError(f"train.init={source}: {name} holds {found}; name another checkpoint")
    return weights


def _from_run(source: str, task: Task) -> dict[str, Tensor]:
    found = LoadedRun.open(source)
    if found.tokens.fingerprint != task.tokens.fingerprint:
        raise UserError(
            f"train.init={source}: its ids mean other tokens than those of data.path; prepare the data of both with "
            "the same tokenizer and vocabulary"
        )
    return found.tensors


def _from_hugging_face(folder: Path, task: Task, settings: Section) -> dict[str, Tensor]:
    if not isinstance(settings, TransformerConfig):
        raise UserError(f"train.init={folder}: is for model.name=transformer, not for a model of your own")
    hf.check_settings(folder, settings)
    original_ids = with_own_mask(hf.read_checkpoint(folder), getattr(task, "original_ids", None), task.tokens)
    return read_weights(folder, original_ids=original_ids, vocab_size=task.tokens.vocab_size)
