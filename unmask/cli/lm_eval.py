"""The verb `unmask lm-eval`."""

import argparse
import importlib.util
import os
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.cli import options
from unmask.config.run import FEWEST_DRAWS, MOST_DRAWS
from unmask.decoding.config import DecodeConfig
from unmask.errors import RunFailed, UserError
from unmask.evaluation.continuations import NUM_DRAWS
from unmask.training.distributed import joined, read_launch

_PATIENCE = 4 * 3600.0
"""Seconds that processes wait for the slowest of them."""
SETTINGS = {"ignore_unknown_options": True}


def lm_eval(
    run: options.Run,
    lm_eval_options: Annotated[
        list[str] | None, typer.Argument(metavar="[LM_EVAL'S OPTIONS]", help="Those of `lm_eval run`, after RUN.")
    ] = None,
    decoder: options.Decoder = None,
    draws: Annotated[
        int,
        typer.Option(
            min=FEWEST_DRAWS,
            max=MOST_DRAWS,
            help="Masks of each continuation whose likelihood is asked for, at most.",
        ),
    ] = NUM_DRAWS,
    mask_seed: Annotated[int, typer.Option(min=0, help="Keys these masks.")] = 0,
    is_greedy: Annotated[
        bool,
        typer.Option(
            "--is-greedy", help="Also find whether decoding would write each continuation: one more decoding each."
        ),
    ] = False,
    weights: options.Weights = None,
    step: options.Step = "last",
    trust_code: options.TrustCode = False,
    follow_links: options.FollowLinks = False,
) -> None:
    """Evaluate a run with lm-evaluation-harness (pip install 'unmask[lm_eval]').

    All other options are those of `lm_eval run`: `--tasks`, `--num_fewshot`, `--limit`, `--apply_chat_template`,
    `--gen_kwargs`, `--include_path`, `--output_path`, `--use_cache` and so on. RUN comes first. `--batch_size` and
    `--device` are `auto` by default.

    Several processes, as of `torchrun --nproc-per-node 4 -m unmask lm-eval ..`, share the documents of each task.

    Tasks that read files of yours, without a network: `unmask_gsm8k`, `unmask_humaneval`, `unmask_mbpp` and
    `unmask_multiple_choice`; the file is named by `--metadata data=FILE`. Code runs in this package's sandbox.

    Examples:

    * `unmask lm-eval runs/mine --tasks unmask_multiple_choice --metadata data=questions.jsonl`

    * `unmask lm-eval models/LLaDA-8B-Instruct --tasks hellaswag --draws 64 --limit 100`

    * `unmask lm-eval runs/chat --tasks gsm8k --apply_chat_template --output_path results --log_samples`
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("unmask lm-eval: lm-evaluation-harness is not installed; pip install 'unmask[lm_eval]'")
    settings = {}
    if decoder is not None:
        options.parse_decoder(decoder, DecodeConfig())  # refuses what is wrong before anything is read
        # A default that is asked for counts too: the run's may be another.
        settings = options.read_decoder(decoder)
    model: dict[str, Any] = {"path": run, "weights": weights, "step": step}
    model |= {"draws": draws, "mask_seed": mask_seed, "is_greedy": is_greedy}
    given = {key: value for key, value in model.items() if value is not None}
    _execute(_parse(lm_eval_options or []), given | settings)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are this package's."""

    def error(self, message: str) -> Any:
        raise UserError(f"unmask lm-eval: {message}")


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Parses lm-eval's own options.

    Raises:
        UserError: there is no such option, or its value is wrong.
    """
    from lm_eval._cli.run import Run

    own = {"--model", "-M", "--model_args", "-a"} & {word.partition("=")[0] for word in arguments}
    if own:
        raise UserError(f"{min(own)}: the model is RUN, and its options are those of `unmask lm-eval`; leave it out")
    parser = _Parser(prog="unmask lm-eval", allow_abbrev=False)
    Run.create(parser.add_subparsers(parser_class=_Parser))
    return parser.parse_args(["run", "--batch_size", "auto", "--device", "auto", *arguments])


def _execute(arguments: argparse.Namespace, model: dict[str, Any]) -> None:
    import unmask.lab.harness.model as harness  # registers the model

    arguments.model, arguments.model_args = "unmask", model
    own = str(Path(harness.__file__).parent / "tasks")
    arguments.include_path = [own] if arguments.include_path is None else [own, arguments.include_path]
    try:
        with joined(read_launch(os.environ), timeout=_PATIENCE) as peers, harness.shared_with(peers):
            arguments.func(arguments)
    except (UserError, RunFailed):
        raise
    except (ValueError, KeyError) as error:  # how lm-eval says that an option is wrong
        frames = traceback.walk_tb(error.__traceback__)
        if any(frame.f_globals.get("__name__") == harness.__name__ for frame, _ in frames):
            raise  # from within the model: a fault of ours, or of a library
        raise UserError(f"unmask lm-eval: {error}") from error
