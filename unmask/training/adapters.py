"""Checkpoints of runs that train adapters: merged into their base, and exported as PEFT's."""

from pathlib import Path
from typing import Any

from torch import Tensor

from unmask import files, formats, paths
from unmask.config.run import RunConfig
from unmask.errors import UserError
from unmask.models import lora
from unmask.models.lora import LoraConfig
from unmask.models.on_demand import OnDemand
from unmask.progress import warn
from unmask.tasks.task import Task, build_task
from unmask.training import checkpoint, state
from unmask.training.folder import read_config
from unmask.training.initial import Base, OpenRun, read_base


def lora_of(config: RunConfig) -> LoraConfig | None:
    """Returns the settings of the adapters that a run trains; None if it trains all weights."""
    found: LoraConfig | None = getattr(config.model, "lora", None)
    return found


def choose_weights(averaged: dict[str, Tensor], asked: str | None, run: Path) -> str:
    """Returns `ema` or `raw`, as `asked`; default: `ema` where there is an average.

    Raises:
        UserError: there is no average.
    """
    if asked == "ema" and not averaged:
        raise UserError(f"{run}: has no averaged weights (ema.decay=0); use --weights raw")
    return asked or ("ema" if averaged else "raw")


def merged(
    config: RunConfig, found: Path, adapters: dict[str, Tensor], open_run: OpenRun
) -> tuple[RunConfig, OnDemand]:
    """Returns the settings and the weights of the model without adapters that computes what they and the base do.

    Each weight is read and merged when it is asked for.

    Raises:
        UserError: the base is gone, or another than the checkpoint `found` was trained on.
    """
    settings, base, task = _read(config, found, open_run)
    tensors = lora.merge(base.tensors, adapters, settings, task.tokens.mask_id)
    return config.model_copy(update={"model": config.model.model_copy(update={"lora": None})}), tensors


def _read(config: RunConfig, found: Path, open_run: OpenRun) -> tuple[LoraConfig, Base, Task]:
    settings, task = lora_of(config), build_task(config)
    assert settings is not None, "a run with adapters"
    base = read_base(config, task, open_run)
    base.check(checkpoint.load_rest(found).get("base"), str(found))
    return settings, base, task


def export(
    run: str | Path, target: str | Path, *, weights: str | None, step: str, open_run: OpenRun
) -> tuple[str, int, Base]:
    """Writes `target/adapter_model.safetensors` and `adapter_config.json`, which PEFT loads onto the base.

    Returns the weights (`ema` or `raw`), the step, and the base.

    Raises:
        UserError: the run has no adapters, or its base is another; `target` already holds something.
    """
    run, target = paths.user_path(run), paths.user_path(target)
    files.check_new(target)
    config = read_config(run).of_run(run)
    if lora_of(config) is None:
        raise UserError(f"{run}: trains all weights (model.lora=null); export it without --adapter")
    found = checkpoint.find(run, step, warn)
    tensors, averaged = checkpoint.load_part(found, "model"), checkpoint.load_part(found, "ema/shadow")
    state.check_weights(tensors, averaged, str(found))
    chosen = choose_weights(averaged, weights, run)
    settings, base, task = _read(config, found, open_run)
    mask_row = (task.tokens.mask_id, base.mask_row) if base.trains_mask_row(settings) else None
    adapters, description = lora.to_peft(
        base.tensors,
        tensors | averaged if chosen == "ema" else tensors,
        settings,
        their_name=base.names.theirs,
        source=base.source,
        mask_row=mask_row,
    )
    with files.new_folder(target) as folder:
        files.put_tensors(folder / "adapter_model.safetensors", adapters, {"format": "pt"})
        files.put(folder / "adapter_config.json", formats.to_json(description, indent=1) + "\n")
    return chosen, checkpoint.step_of(found), base


def check_whole(config: RunConfig, run: Any) -> None:
    """Raises `UserError` if the run to take a base from has adapters itself: it would need its own base."""
    if lora_of(config) is not None:
        raise UserError(f"train.init={run}: has adapters itself; take an export of it (unmask export {run} DIR)")
