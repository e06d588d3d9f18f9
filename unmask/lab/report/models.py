"""What a report needs the trained models for: examples being solved, and the masks that are met."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from unmask.decoding.build import build_decoder, in_any_order
from unmask.decoding.config import DecodeConfig, check_guidance
from unmask.decoding.trace import traces
from unmask.errors import UserError
from unmask.lab.diagnostics.subject import restore_trainer
from unmask.lab.report.masks import MaskStatistics, measure_decoding_masks, measure_training_masks
from unmask.lab.report.runs import RunRecord, RunsByMethod
from unmask.models.denoiser import Denoiser
from unmask.models.precision import parameter_dtype, resolve_dtype
from unmask.tasks.task import Task, build_task
from unmask.training import checkpoint, loading
from unmask.training.trainer import Trainer, resolve_device
from unmask.types import CleanBatch

_NUM_DECODED = 32
"""Examples whose decoding shows which masks a model meets."""


@dataclass
class Study:
    """By method, of its first run; what could not be had is missing, and `missing` says why."""

    decoder: str
    replay: dict[str, Any] | None = None
    training_masks: dict[str, MaskStatistics] = field(default_factory=dict)
    decoding_masks: dict[str, MaskStatistics] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def study(
    methods: RunsByMethod,
    decoder: DecodeConfig,
    *,
    num_examples: int,
    warn: Callable[[str], None],
    on_example: Callable[[int], None],
) -> Study:
    """Decodes with each method's first run, from its last checkpoint; all take the same decoder.

    A run without a checkpoint, or whose data are gone, costs its own part of the report alone, and `warn` is told.
    """
    result, replay = Study(decoder.label), _Replay()
    for name, runs in methods.items():
        with _spared(result, f"The replay of {name}", warn):
            _decode(result, replay, name, runs[0], decoder, num_examples, on_example)
        with _spared(result, f"The batches of {name}", warn):
            result.training_masks[name] = measure_training_masks(_trainer(runs[0]))
    result.replay = replay.as_dict(list(methods)) if replay.traces else None
    return result


@contextmanager
def _spared(result: Study, part: str, warn: Callable[[str], None]) -> Iterator[None]:
    """What fails inside is missing from the report, which goes on."""
    try:
        yield
    except UserError as error:
        result.missing.append(f"{part}: {str(error).splitlines()[0]}")
        warn(result.missing[-1])


def _decode(
    result: Study,
    replay: "_Replay",
    name: str,
    run: RunRecord,
    decoder: DecodeConfig,
    num_examples: int,
    on_example: Callable[[int], None],
) -> None:
    task = _task(run)
    examples = task.validation(max(num_examples, _NUM_DECODED))
    check_guidance(decoder, run.config.data)
    model, dtype, device = _model(run)
    build_decoder(decoder, model, task.tokens)  # refuses what the model cannot do
    engine = in_any_order(decoder, model, task.tokens)
    result.decoding_masks[name] = measure_decoding_masks(
        engine, examples[:_NUM_DECODED], block_size=model.block_size, dtype=dtype, device=device
    )
    shown = examples[:num_examples]
    replay.check(task, shown)
    replay.traces[name] = traces(engine, task, shown, dtype=dtype, device=device)
    on_example(replay.num_traces)


def _task(run: RunRecord) -> Task:
    return build_task(run.config.of_run(run.folder))


def _device(run: RunRecord) -> torch.device:
    """Where the run was trained, if this machine has such a device."""
    return resolve_device("cpu" if run.config.train.device == "cpu" else "auto")


def _model(run: RunRecord) -> tuple[Denoiser, str, torch.device]:
    """In eval mode, with the averaged weights where there are any."""
    source = loading.read(run.folder)
    device = _device(run)
    dtype = resolve_dtype(run.config.decode.dtype or run.config.train.dtype, device)
    return source.model().to(device, parameter_dtype(dtype)), dtype, device


def _trainer(run: RunRecord) -> Trainer:
    """With the model, average and process of the last checkpoint."""
    return restore_trainer(run.config, _task(run), checkpoint.find(run.folder, "last", lambda line: None))


class _Replay:
    """Traces of methods on the same examples, for the page's script."""

    def __init__(self) -> None:
        self.task: Task | None = None
        self.examples: CleanBatch | None = None
        self.traces: dict[str, list[dict[str, Any]]] = {}

    def check(self, task: Task, examples: CleanBatch) -> None:
        """The first task and examples are everyone's.

        Raises:
            UserError: these are others.
        """
        if self.task is None or self.examples is None:
            self.task, self.examples = task, examples
        elif not (
            task.tokens == self.task.tokens
            and torch.equal(examples.x0, self.examples.x0)
            and torch.equal(examples.prompt_mask, self.examples.prompt_mask)
        ):
            raise UserError(f"held-out examples differ from those of {next(iter(self.traces))}")

    @property
    def num_traces(self) -> int:
        return sum(map(len, self.traces.values()))

    def _shown(self, *canvases: list[list[int]]) -> set[int]:
        """The tokens that the page writes somewhere: of a large vocabulary, few."""
        tokens = {token for canvas in canvases for row in canvas for token in row}
        for trace in (trace for own in self.traces.values() for trace in own):
            tokens.update(trace["tokens"], *(step[key] for step in trace["steps"] for key in ("guess", "values")))
        return tokens

    def as_dict(self, methods: list[str]) -> dict[str, Any]:
        """`styles` are the shown methods' numbers among all."""
        task, examples = self.task, self.examples
        assert task is not None
        assert examples is not None
        prompts = examples.masked(task.tokens.mask_id).tolist()
        return {
            "canvas": vars(task.canvas),
            "symbols": {token: task.symbol(token) for token in sorted(self._shown(prompts, examples.x0.tolist()))},
            "mask_id": task.tokens.mask_id,
            "methods": list(self.traces),
            "styles": [methods.index(name) for name in self.traces],
            "puzzles": [
                {"prompt": prompt, "truth": truth, "traces": list(own)}
                for prompt, truth, own in zip(
                    prompts, examples.x0.tolist(), zip(*self.traces.values(), strict=True), strict=True
                )
            ],
        }
