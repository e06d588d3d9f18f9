"""The source `puma`: the settings and checkpoints of the PUMA paper's code (JaeyeonKim01/PUMA), whose data are read as
they are (`data/store.py`, `tasks/sudoku/formats.py`).

Nothing of that code is here, and none is run: these are readers of its files.
"""

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from unmask import files, paths
from unmask.errors import UserError
from unmask.training.sources.puma import recipe
from unmask.training.sources.puma.model import Model
from unmask.training.sources.puma.settings import Settings, read

OPTIONS: Collection[str] = ("config", "script", "gpus", "tokenizer", "weights")
_OF_RECIPE = ("script", "gpus", "tokenizer")


class Recipe:
    """A YAML file as a recipe."""

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        self._settings: Settings = read(path, options.get("script"))
        self._lines = recipe.lines(self._settings, **{k: v for k, v in options.items() if k != "script"})
        recipe.check_as_run(self._settings, self._lines)
        given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        self._command = shlex.join(["unmask", "import", "--from", "puma", str(path), *given])

    @property
    def _text(self) -> str:
        return recipe.write_out(self._settings, self._lines, self._command).rstrip("\n")

    def shown(self, target: Path | None) -> str:
        return self._text if target is None else ""

    def write(self, target: Path) -> None:
        if target.suffix not in (".yaml", ".yml"):
            raise UserError(f"--out {target}: a recipe is a .yaml file; name one")
        with files.naming(target, "--out "):
            files.write(target, f"{self._text}\n")

    def next_steps(self, target: Path | None) -> list[str]:
        if target is None:
            return ["To keep it: --out FILE.yaml"]
        name = shlex.quote(str(target))
        return [f"Check it:  unmask settings {name}", f"Train it:  unmask train {name}"]


def find(path: Path, **options: Any) -> Recipe | Model:
    """Finds a YAML file or a checkpoint.

    Raises:
        UserError: it is neither, or as `Recipe` and `Model`.
    """
    file = paths.existing_file(path)
    if file.suffix in (".yaml", ".yml"):
        if wrong := [name for name in options if name not in _OF_RECIPE]:
            raise UserError(f"--{wrong[0]}: is for a checkpoint; {path} is a file of settings")
        return Recipe(file, options)
    if file.suffix in (".pt", ".pth", ".ckpt"):
        return Model(file, **options)
    raise UserError(f"{path}: neither a .yaml file of settings nor a .pt checkpoint of the PUMA paper's code")
