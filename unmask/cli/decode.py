"""`unmask decode`."""

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.live import Live
from torch import Tensor

from unmask.cli import options
from unmask.decoding.build import AnyDecoder, build_decoder
from unmask.models.precision import autocast, parameter_dtype, resolve_dtype
from unmask.progress import console, progress
from unmask.tasks.build import build_task
from unmask.tasks.task import Task
from unmask.training import loading
from unmask.training.trainer import resolve_device

_SECONDS_PER_FRAME = 0.12


def decode(
    run: options.Run,
    file: Annotated[
        str, typer.Argument(help="Prompts, one a line (for Sudoku: 81 symbols, . or 0 for empty); - is stdin.")
    ] = "-",
    out: Annotated[Path | None, typer.Option(help="Where the JSON lines go; stdout unless given.")] = None,
    decoder: Annotated[str | None, typer.Option(help=options.DECODER_HELP)] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show the first prompt being filled in, in the terminal.")
    ] = False,
    weights: options.Weights = None,
    step: options.Step = "last",
    device: options.Device = None,
) -> None:
    """Fill in prompts, and write one JSON object for each: the prompt, the answer, and its forward passes (`nfe`).

    Examples:

    * `unmask decode runs/sudoku-puma puzzles.txt --out answers.jsonl`

    * `head -1 puzzles.txt | unmask decode runs/sudoku-puma --watch --decoder margin`
    """
    source = loading.read(run, weights=options.check_weights(weights), step=step)
    config = source.config.decode if decoder is None else options.parse_decoder(decoder, source.config.decode)
    task = build_task(source.config)
    prompts = _read_prompts(task, file)
    place = resolve_device(device or source.config.train.device)
    dtype = resolve_dtype(config.dtype or source.config.train.dtype, place)
    model = source.model().to(place, parameter_dtype(dtype))
    if config.compile:
        model.compile_decoding()
    engine = build_decoder(config, model, source.tokens)
    with nullcontext(sys.stdout) if out is None else options.new_file(out) as target:
        with autocast(dtype, place):
            if watch:
                _watch(engine, task, prompts[:1].to(place))
            records = _decode_all(engine, task, prompts, config.batch_size, place)
        for record in records:
            target.write(json.dumps(record) + "\n")


def _read_prompts(task: Task, file: str) -> Tensor:
    if file == "-":
        if sys.stdin.isatty():
            console.print("Reading prompts from the terminal: one a line, Ctrl-D to end")
        return task.prompts(sys.stdin, "stdin")
    return task.prompts(options.read_lines(file), file)


def _decode_all(
    engine: AnyDecoder, task: Task, prompts: Tensor, batch_size: int, device: torch.device
) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    num_filled = 0
    with progress("Decoding", int((prompts == engine.mask_id).sum())) as update:
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            for decoded in engine.steps(part.to(device), torch.arange(start, start + len(part), device=device)):
                update(num_filled + int((decoded.reveal_step >= 0).sum()))
            num_filled += int((part == engine.mask_id).sum())
            for prompt, tokens, nfe in zip(part, decoded.tokens.cpu(), decoded.nfe.tolist(), strict=True):
                records.append(task.record(prompt, tokens) | {"nfe": nfe})
    return records


def _watch(engine: AnyDecoder, task: Task, prompt: Tensor) -> None:
    """One canvas, filling in step by step."""
    is_given = prompt[0] != engine.mask_id
    with Live(console=console, auto_refresh=False) as live:
        for state in engine.steps(prompt):
            is_new = (state.reveal_step[0] == state.nfe[0] - 1) & ~is_given
            live.update(task.render(state.tokens[0].cpu(), is_given.cpu(), is_new.cpu()), refresh=True)
            time.sleep(_SECONDS_PER_FRAME)
