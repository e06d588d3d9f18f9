"""Runs that never were: a trainer of a toy distribution whose model is given."""

from collections.abc import Sequence
from pathlib import Path

from unmask.config import recipes
from unmask.lab.diagnostics.subject import Subject
from unmask.models.denoiser import Denoiser
from unmask.tasks.task import build_task
from unmask.training.trainer import Trainer


def subject(*settings: str, model: Denoiser | None = None) -> Subject:
    """Of the recipe `debug` with these settings; before its first step."""
    config = recipes.load("debug", [*settings])
    task = build_task(config)
    trainer = Trainer(config, task.tokens, task.train_stream(0))
    if model is not None:
        trainer.model, trainer.ema = model, None
    return Subject(Path("none"), config, task, trainer, 0, "raw", "raw")


def toy_settings(*more: str, values: int = 3, length: int = 6, sharpness: float = 2.0) -> Sequence[str]:
    data = f"data={{values: {values}, length: {length}, sharpness: {sharpness}}}"
    return ["task.name=toy", data, "model.rotary=false", "eval.tokens_per_step=[1]", *more]
