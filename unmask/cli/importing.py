"""The verb `unmask import`."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from unmask import paths
from unmask.cli import options
from unmask.formats import printable
from unmask.progress import console
from unmask.training.exporting import import_checkpoint
from unmask.training.importing import CANVAS, Import, Overrides


def import_(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A Hugging Face checkpoint on this machine.", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="New folder for the model, as an export.")] = None,
    mask_id: Annotated[int | None, typer.Option(min=0, help="The mask, where the checkpoint does not say.")] = None,
    mask_token: Annotated[str | None, typer.Option(help="The same, as the tokenizer writes it.")] = None,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Positions of a block that the model was trained in (default: its own).")
    ] = None,
    alignment: Annotated[
        Literal["same", "next"] | None,
        typer.Option(help="Where a prediction is read, where the checkpoint does not say: at its position, or before."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, max=2**20, help=f"Positions of a canvas, prompt included (default: {CANVAS}).")
    ] = None,
) -> None:
    """Say what a Hugging Face checkpoint is; with --out, write it as a model of this package.

    Llama, Qwen2, Qwen3, and what was made of them: Stable-DiffCoder, dLLM's A2D models, SDAR, Fast-dLLM v2, Dream and
    DiffuCoder; and LLaDA. No code of the folder is run. A Llama or Qwen that names no mask is the causal model that it
    is.

    FOLDER itself can be given in place of a run to `decode`, `chat`, `eval`, and as `train.init`. What it does not say
    is said here, once, and kept in DIR.

    Examples:

    * `unmask import models/LLaDA-8B-Instruct`

    * `unmask import models/SDAR-4B-Chat --out models/sdar --length 1024`

    * `unmask import models/open-dcoder-0.5B --alignment next --mask-token "<M>" --out models/dcoder`
    """
    folder = paths.existing_folder(folder)
    overrides = Overrides(mask_id, mask_token, block_size, alignment, length)
    made = Import(folder, overrides)
    found = made.describe()
    width = max(map(len, found))
    for name, value in found.items():
        options.results().print(f"{name:<{width}}  {printable(value)}")
    model = shlex.quote(str(folder if out is None else out))
    if out is not None:
        import_checkpoint(folder, out, overrides)
        console.print(f"{out}: written")
    elif asked := " ".join(map(shlex.quote, overrides.as_options())):
        console.print(f"To use it so, write it: unmask import {shlex.quote(str(folder))} {asked} --out DIR")
        return
    console.print(f'Continue a text:  echo "Once" | unmask decode {model}')
    console.print(f"Evaluate it:      unmask eval {model} --data text.txt")
    settings = "model.alignment=next" if made.is_causal else ""  # the shape is the checkpoint's
    if out is not None:
        settings = " ".join(f"model.{key}={str(value).lower()}" for key, value in made.checkpoint.settings.items())
    console.print(f"Start from it:    unmask train RECIPE train.init={model} {settings}".rstrip())
