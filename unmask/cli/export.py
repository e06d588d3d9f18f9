"""The verb `unmask export`."""

from pathlib import Path
from typing import Annotated

import typer

from unmask.cli import options
from unmask.progress import console
from unmask.training import loading


def export(
    run: options.Run,
    target: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.", show_default=False)],
    weights: options.Weights = None,
    step: options.Step = "last",
    data_changed: options.DataChanged = False,
    trust_code: options.TrustCode = False,
    follow_links: options.FollowLinks = False,
) -> None:
    """Export a run: its weights as DIR/model.safetensors, its configuration as DIR/config.json.

    `unmask.load(DIR)` loads the model in Python. `unmask eval` and `unmask decode` accept DIR in place of a run.

    Example: `unmask export runs/sudoku-puma my-model --weights ema --step best`
    """
    exported = loading.export(run, target, weights=options.check_weights(weights), step=step)
    console.print(f"{target}: the {exported.weights} weights of step {exported.step}")
