"""Writes trained models: as exports of this package, or in a layout of Hugging Face."""

import json
from contextvars import copy_context
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unmask import files, paths
from unmask.config import registry
from unmask.errors import UserError, choose
from unmask.models.families import LAYOUTS, OURS
from unmask.tasks.task import keep_files
from unmask.training.export_hf import beside_export, write_layout
from unmask.training.loading import LoadedRun

EXPORT_LAYOUTS = {
    OURS: "for this package, and for transformers with code of ours beside it",
    **{name: layout.about for name, layout in LAYOUTS.items()},
}
"""The layouts that a model can be exported in, in words."""
FORMATS = {"own": "as they are", "bfloat16": "rounded, for half the memory in decoding"}
"""The number formats of exported weights, in words."""


def export(
    run: str | Path,
    target: str | Path,
    *,
    layout: str = OURS,
    dtype: str = "own",
    weights: str | None = None,
    step: str = "last",
    trust_code: bool = False,
) -> LoadedRun:
    """Writes a model into the folder `target`; returns what it exported. Adapters are merged.

    Args:
        run: a run, an export, or a Hugging Face checkpoint.
        target: a new or empty folder.
        layout: a key of `EXPORT_LAYOUTS`; `unmask` is all that `load` needs, and a small file of code for transformers
            (`trust_remote_code=True`); others are Hugging Face's.
        dtype: of the weights, a key of `FORMATS`.
        weights, step, trust_code: as in `load`.

    Raises:
        UserError: as `load`; `target` already holds something; or the layout cannot express the model. Nothing is
            written.
    """
    choose(EXPORT_LAYOUTS, "layout", layout)
    choose(FORMATS, "dtype", dtype)

    def open_and_write() -> LoadedRun:
        if trust_code:
            registry.trust_code()
        path = _new_folder(target)
        source = LoadedRun.open(run, weights=weights, step=step, device="cpu")
        if dtype == "bfloat16":
            source = source.rounded()
        if layout == OURS:
            write_export(source, path)
        else:
            write_layout(source, path, layout)
        return source

    return copy_context().run(open_and_write)  # trust ends with this call


def export_adapters(
    run: str | Path, target: str | Path, *, weights: str | None = None, step: str = "last"
) -> LoadedRun:
    """Writes the adapters of a run alone into the folder `target`, for PEFT; returns the run.

    Raises:
        UserError: as `load`; the run has no adapters, or their base is another; `target` already holds something.
            Nothing is written.
    """
    path = _new_folder(target)
    source = LoadedRun.open(run, weights=weights, step=step, device="cpu")
    if source.adapters is None:
        raise UserError(f"{run}: has no adapters (model.lora=null); export it without --adapter")
    source.adapters.write(path)
    return source


def _new_folder(target: str | Path) -> Path:
    path = paths.user_path(target)
    files.check_new(path)
    return path


def write_export(source: LoadedRun, target: Path) -> None:
    """Writes `source` into the new folder `target`, as all that `load` needs; its weights one after the other.

    Raises:
        UserError: its tensors are not those of its model.
    """
    tensors = source.checked_tensors()
    extra, contents = beside_export(source)
    description: dict[str, Any] = {
        "format": "unmask",
        "step": source.step,
        "weights": source.weights,
        "tokens": asdict(source.tokens),
        "run": source.config.model_dump(mode="json"),
        "data": None if source.data is None else asdict(source.data),
        **extra,
    }
    with files.new_folder(target) as folder:
        files.put_tensors(folder / "model.safetensors", tensors, {"format": "pt"}, outlines=tensors.outlines)
        description["run"]["data"] |= keep_files(source.task, folder)
        files.put(folder / "config.json", json.dumps(description, indent=1) + "\n")
        for name, content in contents.items():
            files.put(folder / name, content)
