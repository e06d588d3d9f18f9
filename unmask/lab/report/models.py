"""The parts of a report that run the trained models: examples being solved, and masks of training and decoding."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from unmask.decoding.config import DecodeConfig
from unmask.decoding.trace import traces
from unmask.errors import UserError, first_line
from unmask.lab.report.curves import MaskStatistics, measure_decoding_masks, measure_training_masks
from unmask.lab.report.runs import RunRecord, RunsByMethod
from unmask.tasks.task import Task
from unmask.training.evaluating import evaluated_weights
from unmask.training.loading import LoadedRun
from unmask.training.protocol import result_of_training
from unmask.types import CleanBatch

_NUM_DECODED = 32
"""Number of examples that are decoded to find the masks that a model meets."""


@dataclass
class Study:
    """Results by method, of its first run. `missing` gives the reason for each that could not be had."""

    decoder: str
    replay: dict[str, Any] | None = None
    training_masks: dict[str, MaskStatistics] = field(default_factory=dict)
    decoding_masks: dict[str, MaskStatistics] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The training's own evaluation at the last checkpoint, with its protocol (`result_of_training`)."""
    not_described: list[str] = field(default_factory=list)
    """The reason for each of these that could not be had."""


def study(
    methods: RunsByMethod,
    decoder: DecodeConfig,
    *,
    num_examples: int,
    warn: Callable[[str], None],
    on_example: Callable[[int], None],
) -> Study:
    """Decodes with each method's first run, from its last checkpoint, all with the same decoder.

    A run without a checkpoint, or whose data are gone, is left out, and `warn` is called with the reason.
    """
    result, replay = Study(decoder.label), _Replay()
    for name, runs in methods.items():
        with spared(result.missing, f"The replay of {name}", warn):
            _decode(
                result,
                replay,
                name,
                LoadedRun.open(runs[0].folder, is_published=True),
                decoder,
                num_examples,
                on_example,
            )
        with spared(result.not_described, f"The protocol of {name}", lambda line: None):  # the replay has warned
            result.evaluations[name] = _evaluation(runs[0])
        with spared(result.missing, f"The batches of {name}", warn):
            run = LoadedRun.open(runs[0].folder, warn=lambda line: None, is_published=True)  # the replay has warned
            result.training_masks[name] = measure_training_masks(run.trainer())
    result.replay = replay.as_dict(list(methods)) if replay.traces else None
    return result


@contextmanager
def spared(missing: list[str], part: str, warn: Callable[[str], None]) -> Iterator[None]:
    """Turns a failure inside the context into an entry of `missing`; the report goes on."""
    try:
        yield
    except UserError as error:
        missing.append(f"{part}: {first_line(error)}")
        warn(missing[-1])


def _evaluation(run: RunRecord) -> dict[str, Any]:
    weights = evaluated_weights(run.config)[0]
    loaded = LoadedRun.open(run.folder, weights=weights, warn=lambda line: None, is_published=True)
    rows = [row for row in run.rows if row["step"] == loaded.step and "eval/nelbo" in row]
    return result_of_training(loaded, run.environment, rows[-1] if rows else {})


def _decode(
    result: Study,
    replay: "_Replay",
    name: str,
    run: LoadedRun,
    decoder: DecodeConfig,
    num_examples: int,
    on_example: Callable[[int], None],
) -> None:
    examples = run.held_out(max(num_examples, _NUM_DECODED))
    engine = run.decoder(decoder)
    result.decoding_masks[name] = measure_decoding_masks(
        engine, examples[:_NUM_DECODED], block_size=run.model.block_size, device=run.device
    )
    shown = examples[:num_examples]
    replay.check(run.task, shown)
    replay.traces[name] = traces(engine, run.task, shown, device=run.device)
    on_example(replay.num_traces)


class _Replay:
    """Traces of methods on the same examples, for the page's script."""

    def __init__(self) -> None:
        self.task: Task | None = None
        self.examples: CleanBatch | None = None
        self.traces: dict[str, list[dict[str, Any]]] = {}

    def check(self, task: Task, examples: CleanBatch) -> None:
        """Checks that all methods are shown the same examples of the same task.

        Raises:
            UserError: these differ from the first method's.
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
        """Returns the tokens that the page shows anywhere: few, even of a large vocabulary."""
        tokens = {token for canvas in canvases for row in canvas for token in row}
        for trace in (trace for own in self.traces.values() for trace in own):
            tokens.update(trace["tokens"], *(step[key] for step in trace["steps"] for key in ("guess", "values")))
        return tokens

    def as_dict(self, methods: list[str]) -> dict[str, Any]:
        """Returns the JSON that the page's script reads. `styles` are the shown methods' numbers among all."""
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
