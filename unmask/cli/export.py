"""The verb `unmask export`."""

from pathlib import Path
from typing import Annotated

import typer

from unmask.cli import options
from unmask.progress import console
from unmask.training import adapters, loading


def export(
    run: options.Run,
    target: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.", show_default=False)],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a run with model.lora: the adapters alone, in PEFT's format.")
    ] = False,
    weights: options.Weights = None,
    step: options.Step = "last",
    data_changed: options.DataChanged = False,
    trust_code: options.TrustCode = False,
    follow_links: options.FollowLinks = False,
) -> None:
    """Export a run: its weights as DIR/model.safetensors, its configuration as DIR/config.json.

    `unmask.load(DIR)` loads the model in Python. `unmask eval` and `unmask decode` accept DIR in place of a run.

    The adapters of a run with `model.lora` are merged into their base. `--adapter` writes them alone, for PEFT's
    `PeftModel.from_pretrained(base, DIR)`.

    Example: `unmask export runs/sudoku-puma my-model --weights ema --step best`
    """
    if adapter:
        chosen = options.check_weights(weights)
        kind, number, base = adapters.export(run, target, weights=chosen, step=step, open_run=loading.open_base)
        console.print(f"{target}: the {kind} adapters of step {number}, for {base.source}")
        return
    exported = loading.export(run, target, weights=options.check_weights(weights), step=step)
    console.print(f"{target}: the {exported.weights} weights of step {exported.step}")
