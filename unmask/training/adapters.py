"""Checkpoints of runs that train adapters: merged into their base, and exported as PEFT's."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unmask import files, formats
from unmask.config.run import RunConfig
from unmask.errors import UserError
from unmask.models import lora
from unmask.models.lora import LoraConfig
from unmask.models.on_demand import OnDemand
from unmask.tasks.task import build_task
from unmask.training import checkpoint
from unmask.training.initial import Base, OpenRun, read_base


def lora_of(config: RunConfig) -> LoraConfig | None:
    """Returns the settings of the adapters that a run trains; None if it trains all weights."""
    found: LoraConfig | None = getattr(config.model, "lora", None)
    return found


@dataclass(frozen=True)
class Adapters:
    """The adapters that a run has trained, and the base that they are for."""

    settings: LoraConfig
    tensors: Mapping[str, Tensor]
    base: Base
    mask_id: int

    def merged(self) -> OnDemand:
        """Returns the weights of the model without adapters that computes what they and the base do.

        Each weight is read and merged when it is asked for.

        Raises:
            UserError: they do not fit the base. When all was read: the base is another than they were trained on.
        """
        return lora.merge(self.base.tensors, self.tensors, self.settings, self.mask_id)

    def write(self, target: Path) -> None:
        """Writes `target/adapter_model.safetensors` and `adapter_config.json`, which PEFT loads onto the base.

        Raises:
            UserError: as `merged`.
        """
        mask_row = (self.mask_id, self.base.mask_row) if self.base.trains_mask_row(self.settings) else None
        tensors, description = lora.to_peft(
            self.base.tensors,
            self.tensors,
            self.settings,
            their_name=self.base.names.theirs,
            source=self.base.source,
            mask_row=mask_row,
        )
        self.base.tensors.read_all()
        with files.new_folder(target) as folder:
            files.put_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
            files.put(folder / "adapter_config.json", formats.to_json(description, indent=1) + "\n")


def read_adapters(
    config: RunConfig, found: Path, tensors: Mapping[str, Tensor], open_run: OpenRun
) -> tuple[RunConfig, Adapters]:
    """Returns the settings of the model without the adapters `tensors` of the checkpoint `found`, and these.

    Raises:
        UserError: the base is gone, or of another shape.
    """
    settings, task = lora_of(config), build_task(config)
    assert settings is not None, "a run with adapters"
    base = read_base(config, task, open_run)
    base.check(checkpoint.load_rest(found).get("base"), str(found))
    whole = config.model_copy(update={"model": config.model.model_copy(update={"lora": None})})
    return whole, Adapters(settings, tensors, base, task.tokens.mask_id)


def check_whole(config: RunConfig, run: Any) -> None:
    """Raises `UserError` if the run to take a base from has adapters itself: it would need its own base."""
    if lora_of(config) is not None:
        raise UserError(f"train.init={run}: has adapters itself; take an export of it (unmask export {run} DIR)")
