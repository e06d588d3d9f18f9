"""`unmask train`."""

from pathlib import Path
from typing import Annotated

import typer

from unmask import recipes
from unmask.progress import console
from unmask.training.folder import RunFolder
from unmask.training.run import Run


def train(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe (such as sudoku/puma) or a YAML file.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="key=value", help="Settings over the recipe's, such as train.steps=500."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder; runs/RECIPE unless given.", show_default=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last whole checkpoint, if there is one.")
    ] = False,
) -> None:
    """Train a model.

    The run folder gets config.yaml (all settings), metrics.jsonl, TensorBoard files and checkpoints. Ctrl-C saves and
    stops; `--resume` goes on, bit for bit. Raising `train.steps` on `--resume` extends a finished run; `train.init=RUN`
    starts a new run from another's weights.

    Examples:

    * `unmask train sudoku/puma`

    * `unmask train sudoku/puma process.num_stages=12 train.steps=5000 --out runs/k12`

    * `unmask train sudoku/puma --resume`
    """
    config = recipes.load(recipe, overrides or [])
    folder = RunFolder(out or _default_folder(recipe))
    run = Run(config, folder, title=recipe)
    run.train(resume=resume)
    console.print(f"Done: {folder.path} (next: unmask eval {folder.path})")


def _default_folder(recipe: str) -> Path:
    """`runs/sudoku-puma` for sudoku/puma; `runs/mine` for path/to/mine.yaml."""
    return Path("runs") / (recipe.replace("/", "-") if recipe in recipes.names() else Path(recipe).stem)
