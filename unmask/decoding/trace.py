"""Records decoding step by step: the model's answers, and what each step revealed.

Dimensions: B rows, b rows that are still open, L positions, M positions asked for.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmask.decoding.decoder import Decoder
from unmask.decoding.windows import Blocks, Reader
from unmask.tasks.task import GradedTask, Task
from unmask.types import CleanBatch, Decoded, Prediction, Query


@dataclass(frozen=True)
class StepRecord:
    """One step: the open rows, and the likeliest tokens at the positions `at`, with their probabilities."""

    rows: Int[Tensor, "b"]
    xt: Int[Tensor, "b L"]
    at: Int[Tensor, "M"]
    guess: Int[Tensor, "M"]
    top1: Float[Tensor, "M"]


@dataclass
class RecordingDecoder:
    """Decodes, and keeps a record of each step."""

    decoder: Decoder
    records: list[StepRecord] = field(default_factory=list)

    def decode(self, xt: Int[Tensor, "B L"], key: Int[Tensor, "B"] | None = None) -> Decoded:
        return replace(self.decoder, open_reader=self._open_reader).decode(xt, key)

    def _open_reader(self, xt: Int[Tensor, "B L"]) -> Reader:
        return _RecordingReader(self.decoder.open(xt), torch.arange(len(xt), device=xt.device), self.records)


@dataclass
class _RecordingReader:
    """A reader that records its answers."""

    reader: Reader
    rows: Int[Tensor, "b"]
    records: list[StepRecord]

    def __call__(self, xt: Int[Tensor, "b L"], at: Int[Tensor, "M"], query: Query, blocks: Blocks) -> Prediction:
        answer = self.reader(xt, at, query, blocks)
        self.records.append(StepRecord(*(part.cpu() for part in (self.rows, xt, at, answer.likeliest, answer.top1))))
        return answer

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        self.rows = self.rows[rows]
        self.reader.keep(rows)


def traces(decoder: Decoder, task: Task, examples: CleanBatch, *, device: torch.device) -> list[dict[str, Any]]:
    """Decodes examples; each gets its finished `tokens`, `is_solved` (None: the task cannot grade) and its `steps`."""
    xt = examples.masked(task.tokens.mask_id)
    tokens, steps = trace(decoder, xt.to(device))
    is_solved = [None] * len(tokens)
    if isinstance(task, GradedTask):
        is_solved = task.grade(examples, tokens).measures["accuracy"].tolist()
    return [
        {"tokens": own.tolist(), "is_solved": solved, "steps": each}
        for own, solved, each in zip(tokens, is_solved, steps, strict=True)
    ]


def trace(
    decoder: Decoder, xt: Int[Tensor, "B L"], key: Int[Tensor, "B"] | None = None
) -> tuple[Int[Tensor, "B L"], list[list[dict[str, Any]]]]:
    """Decodes canvases; returns them finished, and the steps of each.

    A step holds the masked positions that the model was asked about (`at`), the likeliest token of each (`guess`) with
    its probability in percent (`sure`), and what changed: `revealed` positions with their `values`, and those that were
    masked `again`.
    """
    recording = RecordingDecoder(decoder)
    tokens = recording.decode(xt, key).tokens.cpu()
    canvases: list[list[Tensor]] = [[] for _ in tokens]
    steps: list[list[dict[str, Any]]] = [[] for _ in tokens]
    for record in recording.records:
        row = record.at // tokens.shape[1]
        for i, number in enumerate(record.rows.tolist()):
            canvases[number].append(record.xt[i])
            steps[number].append(_guesses(record, row == i, record.xt[i] == decoder.mask_id))
    for number, own in enumerate(steps):
        for k, step in enumerate(own):
            after = tokens[number] if k + 1 == len(own) else canvases[number][k + 1]
            step |= _changes(canvases[number][k] == decoder.mask_id, after, decoder.mask_id)
    return tokens, steps


def _guesses(record: StepRecord, is_own: Tensor, is_masked: Tensor) -> dict[str, Any]:
    position = record.at[is_own] % record.xt.shape[1]
    is_shown = is_masked[position]
    return {
        "at": position[is_shown].tolist(),
        "guess": record.guess[is_own][is_shown].tolist(),
        "sure": (100 * record.top1[is_own][is_shown]).round().int().tolist(),
    }


def _changes(was_masked: Tensor, after: Int[Tensor, "L"], mask_id: int) -> dict[str, Any]:
    revealed = (was_masked & (after != mask_id)).nonzero().squeeze(1)
    again = (~was_masked & (after == mask_id)).nonzero().squeeze(1)
    return {"revealed": revealed.tolist(), "values": after[revealed].tolist(), "again": again.tolist()}
