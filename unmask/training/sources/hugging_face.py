"""The source `hf`: folders of the Hugging Face hub, as `training/importing.py` reads them."""

import shlex
from pathlib import Path
from typing import Any

from unmask import paths
from unmask.errors import UserError
from unmask.training.exporting import write_export
from unmask.training.importing import Import, Statements
from unmask.training.loading import is_ours, open_checkpoint
from unmask.training.sources import in_columns

OPTIONS = ("mask_id", "mask_token", "block_size", "alignment", "length")


class HuggingFaceModel:
    """A checkpoint in `folder`, with what a user says of it."""

    def __init__(self, folder: Path, stated: Statements) -> None:
        self.folder, self.stated = folder, stated
        self.made = Import(folder, stated)

    def shown(self, target: Path | None) -> str:
        return in_columns(self.made.describe())

    def write(self, target: Path) -> None:
        write_export(open_checkpoint(self.made, None, "last", "cpu"), target)

    def next_steps(self, target: Path | None) -> list[str]:
        asked = " ".join(map(shlex.quote, self.stated.as_options()))
        if target is None and asked:
            return [f"To use it so, write it: unmask import {shlex.quote(str(self.folder))} {asked} --out DIR"]
        model = shlex.quote(str(target or self.folder))
        settings = "model.alignment=next" if self.made.is_causal else ""  # the shape is the checkpoint's
        if target is not None:
            own = {**self.made.checkpoint.settings, "alignment": self.made.alignment}
            settings = " ".join(f"model.{key}={str(value).lower()}" for key, value in own.items())
        return [
            f'Continue a text:  echo "Once" | unmask decode {model}',
            f"Evaluate it:      unmask eval {model} --data text.txt",
            f"Start from it:    unmask train RECIPE train.init={model} {settings}".rstrip(),
        ]


def find(path: Path, **options: Any) -> HuggingFaceModel:
    """Finds the checkpoint in the folder `path`.

    Raises:
        UserError: as `Import`; or it is a run or an export of this package.
    """
    folder = paths.existing_folder(path)
    if is_ours(folder):
        raise UserError(
            f"{path}: is a model of this package already; give it to decode, eval, export or train.init as it is"
        )
    return HuggingFaceModel(folder, Statements(**options))
