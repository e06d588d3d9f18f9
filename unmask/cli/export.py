"""The verb `unmask export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from unmask.cli import options
from unmask.errors import UserError
from unmask.progress import console
from unmask.training import adapters, loading
from unmask.training.export_hf import export_plain


def export(
    run: options.Run,
    target: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.", show_default=False)],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a run with model.lora: the adapters alone, in PEFT's format.")
    ] = False,
    layout: Annotated[
        Literal["unmask", "plain"],
        typer.Option(help="unmask: for this package; plain: Llama, Qwen2 or Qwen3, which transformers (>= 5.2) loads."),
    ] = "unmask",
    weights: options.Weights = None,
    step: options.Step = "last",
    data_changed: options.DataChanged = False,
    trust_code: options.TrustCode = False,
    follow_links: options.FollowLinks = False,
) -> None:
    """Export a run: its weights as DIR/model.safetensors, its configuration as DIR/config.json.

    `unmask.load(DIR)` loads the model in Python. `unmask eval` and `unmask decode` accept DIR in place of a run.

    `--layout plain` writes a Hugging Face folder that transformers loads, from 5.2 on, without remote code: a Llama,
    Qwen2 or Qwen3 with `"is_causal": false`, its tokenizer and chat template, and a model card that says how to decode.
    This package reads it too. A model that is none of these (learned positions, loops, self-conditioning ...) is
    refused.

    The adapters of a run with `model.lora` are merged into their base. `--adapter` writes them alone, for PEFT's
    `PeftModel.from_pretrained(base, DIR)`.

    Example: `unmask export runs/sudoku-puma my-model --weights ema --step best`

    Example: `unmask export runs/chat my-model --layout plain`
    """
    chosen = options.check_weights(weights)
    if adapter:
        if layout != "unmask":
            raise UserError(f"--layout {layout}: --adapter is in PEFT's format; give one of them")
        kind, number, base = adapters.export(run, target, weights=chosen, step=step, open_run=loading.open_base)
        console.print(f"{target}: the {kind} adapters of step {number}, for {base.source}")
        return
    if layout == "plain":
        exported, family = export_plain(run, target, weights=chosen, step=step)
        console.print(f"{target}: a {family}, with the {exported.weights} weights of step {exported.step}")
        return
    exported = loading.export(run, target, weights=chosen, step=step)
    console.print(f"{target}: the {exported.weights} weights of step {exported.step}")
