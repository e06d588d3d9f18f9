"""The verb `unmask import`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from unmask import paths
from unmask.cli import options
from unmask.progress import console
from unmask.training import sources
from unmask.training.importing import CANVAS


def import_(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A Hugging Face checkpoint on this machine, or a file of --from.", show_default=False
        ),
    ],
    source: Annotated[
        str,
        typer.Option(
            "--from", metavar="SOURCE", help="hf: a folder of the Hugging Face hub; puma: the PUMA paper's code."
        ),
    ] = "hf",
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="New folder for the model, as an export; new .yaml file for a recipe."),
    ] = None,
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
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="puma: what a checkpoint was trained with (default: what it holds)."),
    ] = None,
    script: Annotated[
        str | None,
        typer.Option(help="puma: train.py or train_block.py, which was started (default: as far as the file tells)."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, max=10**6, help="puma: GPUs that it ran on, a batch each (default: 1).")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="puma: ema (averaged) or raw weights (default: ema if the checkpoint has them).")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="puma: the tokenizer of TinyGSM, a folder or a name (default: in a model, ids are ids)."),
    ] = None,
) -> None:
    """Say what a model or a recipe of other code is; with --out, write it as one of this package.

    `--from hf` (default): Llama, Qwen2, Qwen3, and what was made of them: Stable-DiffCoder, dLLM's A2D models, SDAR,
    Fast-dLLM v2, Dream and DiffuCoder; and LLaDA. A Llama or Qwen that names no mask is the causal model that it is.
    The folder itself can be given in place of a run to `decode`, `chat`, `eval`, and as `train.init`. What it does not
    say is said here, once, and kept in DIR.

    `--from puma`: JaeyeonKim01/PUMA. A `.yaml` file becomes a recipe that says of every key what it is here; a
    checkpoint, `step=N.pt` or `ema_step=N.pt`, becomes a model with the same logits. Its data are read as they are.

    No code of a folder or file is run.

    Examples:

    * `unmask import models/LLaDA-8B-Instruct`

    * `unmask import models/SDAR-4B-Chat --out models/sdar --length 1024`

    * `unmask import models/open-dcoder-0.5B --alignment next --mask-token "<M>" --out models/dcoder`

    * `unmask import --from puma yaml_files/tinygsm_puma.yaml --gpus 8 --out mine.yaml`

    * `unmask import --from puma ckpts/ema_step=300000.pt --tokenizer Qwen/Qwen2-0.5B --out models/puma`
    """
    given = {
        "mask_id": mask_id,
        "mask_token": mask_token,
        "block_size": block_size,
        "alignment": alignment,
        "length": length,
        "config": config,
        "script": script,
        "gpus": gpus,
        "weights": weights,
        "tokenizer": tokenizer,
    }
    target = None if out is None else paths.user_path(out, options.OUT)
    found = sources.find(source, path, {name: value for name, value in given.items() if value is not None}, target)
    if described := found.shown(target):
        options.results().print(described)
    if target is not None:
        found.write(target)
        console.print(f"{out}: written")
    for line in found.next_steps(target):
        console.print(line)
