"""Weights to start from: of a run, an export, or a Hugging Face checkpoint."""

from pathlib import Path

from torch import Tensor, nn

from unmask.errors import UserError
from unmask.models import hf
from unmask.models.transformer import Transformer, TransformerConfig
from unmask.section import Section
from unmask.tasks.task import Task
from unmask.training import loading, shapes


def read(source: str, task: Task, settings: Section, model: nn.Module) -> dict[str, Tensor]:
    """The state of `model`, of `settings`, that `source` holds. What is to start at 0 may be missing there.

    Raises:
        UserError: nothing of the kind is there, or it is of another vocabulary or shape; the message says which.
    """
    folder = Path(source).expanduser()
    weights = _of_checkpoint(folder, task, settings) if hf.is_checkpoint(folder) else _of_run(source, task)
    own = model.state_dict()
    weights = {name: own[name] for name in own if name.endswith(Transformer.STARTS_AT_ZERO)} | weights
    if named := shapes.differences(own, weights):
        raise UserError(
            f"train.init={source}: its model differs from this one: {named}; set `model` as it has it, or name another"
        )
    return weights


def _of_run(source: str, task: Task) -> dict[str, Tensor]:
    found = loading.read(source)
    if found.tokens.fingerprint != task.tokens.fingerprint:
        raise UserError(
            f"train.init={source}: its ids mean other tokens than those of data.path; prepare the data of both with "
            "the same tokenizer and vocabulary"
        )
    return found.tensors


def _of_checkpoint(folder: Path, task: Task, settings: Section) -> dict[str, Tensor]:
    if not isinstance(settings, TransformerConfig):
        raise UserError(f"train.init={folder}: is for model.name=transformer, not for a model of your own")
    hf.check_settings(folder, settings)
    original_ids = getattr(task, "original_ids", None)
    return hf.read_weights(folder, original_ids=original_ids, vocab_size=task.tokens.vocab_size)
