"""A run as its checkpoint left it, ready to be asked."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from unmask.config.run import RunConfig
from unmask.errors import UserError
from unmask.models.denoiser import Denoiser
from unmask.tasks.task import Task, build_task
from unmask.training import checkpoint
from unmask.training.folder import read_config
from unmask.training.trainer import Trainer, resolve_device


class NotApplicable(UserError):
    """What a diagnostic asks does not exist in this run; the others go on."""


@dataclass(frozen=True)
class Subject:
    """Model, average, process and data of a run, as of `step`; nothing is trained further."""

    run: Path
    config: RunConfig
    task: Task
    trainer: Trainer
    step: int
    weights: str
    """`ema` or `raw`: what is evaluated and decoded from."""
    gradient_weights: str
    """Where gradients are taken: `raw`, which a training step starts from, unless others were asked for."""

    @staticmethod
    def open(
        run: Path,
        warn: Callable[[str], None],
        *,
        step: str = "last",
        weights: str | None = None,
        device: str | None = None,
    ) -> "Subject":
        """Reads a run folder; a run that is still training is as its last checkpoint says.

        Raises:
            UserError: an export, no checkpoint, weights that it does not have, or its data are gone.
        """
        if (run / "model.safetensors").exists():
            raise UserError(f"{run}: an export holds no training; give the run that it was made from")
        config = read_config(run).of_run(run)
        path = checkpoint.find(run, step, warn)
        task = build_task(config)
        trainer = restore_trainer(config, task, path, device)
        if weights == "ema" and trainer.ema is None:
            raise UserError(f"{run}: has no averaged weights (ema.decay=0); use --weights raw")
        evaluated = weights or ("raw" if trainer.ema is None else "ema")
        return Subject(run, config, task, trainer, checkpoint.step_of(path), evaluated, weights or "raw")

    @property
    def model(self) -> Denoiser:
        """In eval mode."""
        return self.trainer.model.eval()

    def use_weights(self, weights: str) -> AbstractContextManager[None]:
        return self.trainer.weights(weights)


def restore_trainer(config: RunConfig, task: Task, path: Path, device: str | None = None) -> Trainer:
    """A trainer with the model, average and process of the checkpoint `path`: what the next batches depend on.

    On `device`; unless given, where the run was trained, if this machine has such a one.
    """
    place = resolve_device(device or ("cpu" if config.train.device == "cpu" else "auto"))
    settings = config.train.model_copy(update={"compile": False, "device": str(place)})
    state = checkpoint.load(path)
    trainer = Trainer(config.model_copy(update={"train": settings}), task.tokens, task.train_stream(settings.seed))
    trainer.model.load_state_dict(state["model"])
    trainer.process.load_state_dict(state["process"])
    trainer.step_number = state["trainer"]["step_number"]
    if trainer.ema is not None:
        trainer.ema.load_state_dict(state["ema"])
    return trainer
