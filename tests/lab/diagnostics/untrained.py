"""Runs that never were: a trainer of a toy distribution whose model is given."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unmask.config import recipes
from unmask.models.denoiser import Denoiser
from unmask.tasks.task import build_task
from unmask.training.loading import LoadedRun
from unmask.training.trainer import Trainer


@dataclass(eq=False, kw_only=True)
class UntrainedRun(LoadedRun):
    """A run before its first step, without a folder."""

    own_trainer: Trainer

    def trainer(self) -> Trainer:
        return self.own_trainer


def untrained_run(*settings: str, model: Denoiser | None = None) -> UntrainedRun:
    """Returns a run of the recipe `debug` with these settings."""
    config = recipes.load("debug", [*settings])
    task = build_task(config)
    trainer = Trainer(config, task.tokens, task.train_stream(0))
    if model is not None:
        trainer.model, trainer.ema = model, None
    trainer.model.eval()
    return UntrainedRun(Path("none"), config, {}, "raw", 0, trainer.device, own_trainer=trainer)


def toy_settings(*more: str, values: int = 3, length: int = 6, sharpness: float = 2.0) -> Sequence[str]:
    data = f"data={{values: {values}, length: {length}, sharpness: {sharpness}}}"
    return ["task.name=toy", data, "model.rotary=false", "eval.tokens_per_step=[1]", *more]
