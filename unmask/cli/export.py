"""The verb `unmask export`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from unmask import paths
from unmask.cli import options
from unmask.config.run import RunConfig
from unmask.config.settings import flatten
from unmask.errors import UserError
from unmask.models.families import OURS
from unmask.models.hf import read_checkpoint
from unmask.models.hf_writing import needs_our_code
from unmask.progress import console
from unmask.training import exporting, loading


def _listed(choices: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {about}" for name, about in choices.items()) + "."


def export(
    run: options.Run,
    target: Annotated[str, typer.Argument(metavar="DIR", help="The folder to make.", show_default=False)],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a run with model.lora: the adapters alone, in PEFT's format.")
    ] = False,
    layout: Annotated[
        str, typer.Option(metavar=f"[{'|'.join(exporting.EXPORT_LAYOUTS)}]", help=_listed(exporting.EXPORT_LAYOUTS))
    ] = OURS,
    dtype: Annotated[
        str, typer.Option(metavar=f"[{'|'.join(exporting.FORMATS)}]", help=_listed(exporting.FORMATS))
    ] = "own",
    weights: options.Weights = None,
    step: options.Step = "last",
    data_changed: options.DataChanged = False,
    trust_code: options.TrustCode = False,
    follow_links: options.FollowLinks = False,
) -> None:
    """Export a run: its weights as DIR/model.safetensors, its configuration as DIR/config.json.

    `unmask.load(DIR)` loads the model in Python. `unmask eval` and `unmask decode` accept DIR in place of a run.

    transformers (4.57 and later) loads DIR as well, with `trust_remote_code=True`: DIR/modeling_unmask.py is all the
    code it takes, with a `generate` that decodes as this package does. A model of text has its tokenizer and chat
    template there; a model card says how to decode.

    `--layout plain` writes a Hugging Face folder that transformers loads, from 5.2 on, without remote code: a Llama,
    Qwen2 or Qwen3 with `"is_causal": false`, its tokenizer and chat template, and a model card that says how to decode.
    `--layout sdar` is for block models with model.qk_norm, which SGLang and lmdeploy serve; `--layout dream` for models
    with model.qkv_bias and alignment `next`; `--layout llada` for plain ones with alignment `same`. This package reads
    all of them too. A model that a layout cannot express (learned positions, loops, self-conditioning ...) is refused,
    with the settings that are in the way.

    The adapters of a run with `model.lora` are merged into their base, in fp32 unless `--dtype bfloat16`. `--adapter`
    writes them alone, for PEFT's `PeftModel.from_pretrained(base, DIR)`.

    Example: `unmask export runs/sudoku-puma my-model --weights ema --step best`

    Example: `unmask export runs/chat my-model --layout plain`

    Example: `unmask export runs/block-chat my-model --layout sdar`
    """
    if adapter:
        if layout != OURS:
            raise UserError(f"--layout {layout}: --adapter is in PEFT's format; give one of them")
        if dtype != "own":
            raise UserError(f"--dtype {dtype}: adapters stay in fp32; leave it out, or export the merged model")
        trained = exporting.export_adapters(run, target, weights=weights, step=step)
        assert trained.adapters is not None
        base = trained.adapters.base.source
        console.print(f"{target}: the {trained.weights} adapters of step {trained.step}, for {base}")
        return
    exported = exporting.export(run, target, layout=layout, dtype=dtype, weights=weights, step=step)
    if layout == OURS:
        _say_readers(target, exported)
    else:
        family = read_checkpoint(paths.user_path(target)).family_name
        console.print(
            f"{target}: a model of type {family}, with the {exported.weights} weights of step {exported.step}"
        )


def _say_readers(target: str, exported: loading.LoadedRun) -> None:
    """Says who can read an export of our own layout, and which places on this machine it names."""
    problem = needs_our_code(exported.config.model)
    readers = "transformers reads it too (trust_remote_code=True)"
    if problem is not None:
        readers = f"this package alone reads it: {problem}"
    console.print(f"{target}: the {exported.weights} weights of step {exported.step}; {readers}")
    if private := _places(exported.config):
        console.print(
            f"Its config.json names places on this machine: {', '.join(private)}; `unmask eval` reads data there. "
            "Set them to null before you publish it"
        )


def _places(config: RunConfig) -> list[str]:
    """Returns the settings that are absolute paths, each as `key=value`."""
    values = flatten(config.model_dump(mode="json"))
    own = "data.tokenizer"  # an export has its own
    return [f"{k}={v}" for k, v in values if k != own and isinstance(v, str) and Path(v).is_absolute()]
