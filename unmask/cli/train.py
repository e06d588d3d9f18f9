"""The verb `unmask train`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from unmask import paths
from unmask.cli import options
from unmask.config import recipes
from unmask.config.run import RunConfig
from unmask.errors import UserError
from unmask.models.cost import training_memory
from unmask.models.precision import resolve_device, resolve_dtype
from unmask.models.transformer_config import TransformerConfig
from unmask.progress import console
from unmask.training.distributed import device_of, joined, read_launch
from unmask.training.folder import RunFolder, read_settings
from unmask.training.run import Run


def train(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe (such as sudoku/puma) or a YAML file.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="key=value",
            help="Settings that override the recipe's, such as train.steps=500; `unmask settings RECIPE` lists them.",
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="The run folder (default: runs/RECIPE).", show_default=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last complete checkpoint, if there is one.")
    ] = False,
    restart_pool: Annotated[
        bool, typer.Option("--restart-pool", help="With --resume: replace PUMA's pool by one of new examples.")
    ] = False,
    data_changed: Annotated[
        bool,
        typer.Option(
            "--data-changed", help="With --resume: go on even if the data are not those that the run began with."
        ),
    ] = False,
    trust_code: options.TrustCode = False,
    follow_links: options.FollowLinks = False,
) -> None:
    """Train a model.

    The run folder receives config.yaml (all settings), metrics.jsonl, TensorBoard files and checkpoints. Ctrl-C saves
    and stops; `--resume` goes on, bit for bit.

    To extend a finished run, raise `train.steps` with `--resume`: exact with `optim.schedule=constant`, and with `wsd`
    from a checkpoint before the rate falls, while a cosine schedule becomes a longer one. `train.init=RUN` starts a new
    run from another run's weights. Under `torchrun` (or another launcher) several processes share each batch.

    Examples:

    * `unmask train sudoku/puma`

    * `unmask train sudoku/puma process.num_stages=12 train.steps=5000 --out runs/k12`

    * `unmask train sudoku/puma --resume`

    * `torchrun --nproc-per-node 2 -m unmask train sudoku/puma`
    """
    for option, is_given in (("--data-changed", data_changed), ("--restart-pool", restart_pool)):
        if is_given and not resume:
            raise UserError(f"{option}: goes with --resume, which goes on with a run that has begun; leave it out")
    launch = read_launch(os.environ)
    default = Path("runs") / recipes.short_name(recipe).replace("/", "-")
    path = paths.user_path(default if out is None else out, options.OUT)
    config, problem = _load(recipe, overrides or [], RunFolder(path) if resume else None)
    with joined(launch, timeout=60.0 if config is None else config.train.timeout) as peers:
        with peers.raise_together():
            if problem is not None:
                raise problem
        assert config is not None, "there is no problem"
        folder = RunFolder(path)
        run = Run(config, folder, title=recipe, peers=peers)
        if peers.is_main:
            _say_memory(run)
        run.train(resume=resume, restart_pool=restart_pool, data_changed=data_changed)
    console.print(f"Done: {folder.path} (next: unmask eval {folder.path})")


def _say_memory(run: Run) -> None:
    """Says what a large model's training will need."""
    config, train, size = run.config, run.config.train, run.peers.size
    if not isinstance(config.model, TransformerConfig) or train.parallel == "fsdp":
        return
    device = resolve_device(device_of(run.peers, train.device))
    memory = training_memory(
        config.model,
        run.task.tokens,
        rows=max(1, train.batch_size // size // train.accumulate),
        dtype=resolve_dtype(train.dtype, device),
        copies=config.optim.copies + bool(config.ema.decay),
    )
    if memory.total >= 2**30:
        less = "model.checkpointing=true and a larger train.accumulate need less"
        console.print(f"Memory, estimated: about {memory}; {less}")


def _load(recipe: str, overrides: list[str], resumed: RunFolder | None) -> tuple[RunConfig | None, UserError | None]:
    """Loads the recipe, and returns an error instead of raising it, so that all processes can report it once."""
    try:
        held = read_settings(resumed.path) if resumed is not None and resumed.exists() else None
        return recipes.load(recipe, overrides, resumed=held), None
    except UserError as error:
        return None, error
