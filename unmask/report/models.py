"""What a report needs the trained models for: puzzles being solved, and the masks that are met."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmask.config import DecodeConfig
from unmask.errors import UserError
from unmask.models.denoiser import Denoiser
from unmask.models.precision import parameter_dtype, resolve_dtype
from unmask.registry import resolve
from unmask.report.masks import Masks, met_when_decoding, trained_on
from unmask.report.replay import traces
from unmask.report.runs import Methods, Recorded
from unmask.tasks.task import Task
from unmask.training import checkpoint, loading
from unmask.training.trainer import Trainer, resolve_device
from unmask.types import CleanBatch

_NUM_DECODED = 32
"""Examples whose decoding shows which masks a model meets."""


@dataclass
class Study:
    """By method, of its first run; what could not be had is missing, with the reason."""

    replay: dict[str, Any] | None = None
    no_replay: str = ""
    decoder: str = ""
    trained_on: dict[str, Masks] = field(default_factory=dict)
    decoded: dict[str, Masks] = field(default_factory=dict)
    no_batches: dict[str, str] = field(default_factory=dict)


def study(
    methods: Methods,
    decoder: DecodeConfig,
    *,
    num_puzzles: int,
    warn: Callable[[str], None],
    on_example: Callable[[int], None],
) -> Study:
    """Decodes with each method's first run, from its last checkpoint; all take the same examples and decoder.

    A run without a checkpoint, or whose data are gone, costs its part of the report alone, and `warn` is told.
    """
    result = Study(decoder=decoder.label)
    try:
        _decode(result, methods, decoder, num_puzzles, warn, on_example)
    except UserError as error:
        result.no_replay = _one_line(error)
        warn(f"no replay: {error}")
    for name, runs in methods.items():
        try:
            result.trained_on[name] = _next_batches(runs[0], warn)
        except UserError as error:
            result.no_batches[name] = _one_line(error)
            warn(f"{runs[0].folder}: no batches: {error}")
    return result


def _one_line(error: UserError) -> str:
    return str(error).partition("\n")[0]


def _decode(
    result: Study,
    methods: Methods,
    decoder: DecodeConfig,
    num_puzzles: int,
    warn: Callable[[str], None],
    on_example: Callable[[int], None],
) -> None:
    first = next(iter(methods.values()))[0]
    task = _task(first)
    examples = task.validation(max(num_puzzles, _NUM_DECODED))
    found, done = [], 0
    for name, runs in methods.items():
        model, dtype = _model(runs[0])
        device = next(model.parameters()).device
        result.decoded[name] = met_when_decoding(
            model.predict, task.tokens.mask_id, examples[:_NUM_DECODED], decoder, dtype=dtype, device=device
        )
        own = []
        for trace in traces(model.predict, task, examples[:num_puzzles], decoder, dtype=dtype, device=device):
            own.append(trace)
            done += 1
            on_example(done)
        found.append(own)
    result.replay = _replay(task, list(methods), examples[:num_puzzles], found)


def _task(run: Recorded) -> Task:
    task: Task = resolve("task", run.config.task.name).from_config(run.config.data)
    return task


def _model(run: Recorded) -> tuple[Denoiser, str]:
    """In eval mode, on the device that the run was trained on where there is one."""
    source = loading.read(run.folder)
    device = resolve_device("auto" if run.config.train.device != "cpu" else "cpu")
    dtype = resolve_dtype(run.config.decode.dtype or run.config.train.dtype, device)
    return source.model().to(device, parameter_dtype(dtype)), dtype


def _next_batches(run: Recorded, warn: Callable[[str], None]) -> Masks:
    settings = run.config.train.model_copy(update={"compile": False, "device": "auto"})
    config = run.config.model_copy(update={"train": settings})
    task = _task(run)
    path = checkpoint.newest(Path(run.folder) / "checkpoints", warn)
    if path is None:
        raise UserError(f"{run.folder}: holds no complete checkpoint")
    trainer = Trainer(config, task.tokens, task.train_stream(config.train.seed))
    trainer.load_state_dict(checkpoint.load(path))
    return trained_on(trainer)


def _replay(task: Task, methods: list[str], examples: CleanBatch, found: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """What the page's script draws from."""
    prompts = examples.masked(task.tokens.mask_id)
    return {
        "canvas": vars(task.canvas),
        "symbols": [task.symbol(token) for token in range(task.tokens.vocab_size)],
        "mask_id": task.tokens.mask_id,
        "methods": methods,
        "puzzles": [
            {"prompt": prompt, "truth": truth, "traces": list(own)}
            for prompt, truth, own in zip(prompts.tolist(), examples.x0.tolist(), zip(*found, strict=True), strict=True)
        ],
    }
