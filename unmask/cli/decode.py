"""`unmask decode`."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, TextIO

import typer
from torch import Tensor

from unmask.cli import options, prompts
from unmask.cli.prompts import Prompts
from unmask.cli.session import Answer, DecodeSession
from unmask.cli.unfinished import open_unfinished
from unmask.data.fingerprint import digest
from unmask.decoding.config import DecodeConfig
from unmask.errors import Interrupted, UserError
from unmask.formats import to_json
from unmask.progress import console, progress
from unmask.tasks.task import Task
from unmask.training.loading import LoadedRun

_MOST_TRACED = 32
"""Most rows of a batch that is traced, as every step of every row is kept."""


def decode(
    run: options.Run,
    file: Annotated[
        str,
        typer.Argument(
            help="File of prompts, one a line; - is stdin. For Sudoku 81 symbols, . or 0 for empty; for text a "
            "question; or a JSON object (see above)."
        ),
    ] = "-",
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="New file for the JSON lines (default: stdout); OUT.part until all are done."
        ),
    ] = None,
    decoder: options.Decoder = None,
    num_samples: Annotated[int, typer.Option("--n", min=1, max=1_000_000, help="Answers to draw for each prompt.")] = 1,
    forbid: Annotated[
        list[str] | None, typer.Option(help="Token that is never written, given as text. May be repeated.")
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Also write, for every step, the model's guesses and what was revealed.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show the first prompt being filled in, in the terminal.")
    ] = False,
    weights: options.Weights = None,
    step: options.Step = "last",
    device: options.Device = None,
    data_changed: options.DataChanged = False,
    trust_code: options.TrustCode = False,
    follow_links: options.FollowLinks = False,
) -> None:
    """Fill in prompts, and write one JSON object for each; each batch is written as soon as it is done.

    An object holds the prompt and the answer, `nfe` (forward passes), `seconds` (those of its batch, divided by the
    batch's rows), `tokens` (all ids) and, for text, `canvas` (all of it as text). Ctrl-C keeps what is written; with
    --out that is in OUT.part, and the same command goes on from there.

    A prompt may be a JSON object: `{"puzzle": ..}` for Sudoku, `{"question": ..}` for word problems. Spans to fill in
    may stand anywhere in a text, `{"text": "I have<mask:2> apples."}`, and in `{"question": .., "program": ..}`.
    `"seed": 3` in an object fixes the noise of that prompt, wherever it is in the file.

    Examples:

    * `unmask decode runs/sudoku-puma puzzles.txt --out answers.jsonl`

    * `head -1 puzzles.txt | unmask decode runs/sudoku-puma --watch --decoder margin`

    * `unmask decode runs/sudoku-puma puzzles.txt --n 4 --decoder prob,temperature=1`

    * `echo '{"text": "There are<mask:3> in the basket."}' | unmask decode runs/tinygsm-puma --forbid " no"`
    """
    loaded = LoadedRun.open(run, weights=weights, step=step, device=device)
    config = _with_forbidden(options.parse_decoder(decoder, loaded.config.decode), loaded.task, forbid or [])
    _check_samples(num_samples, config)
    if trace:
        config = config.model_copy(update={"batch_size": min(config.batch_size, _MOST_TRACED)})
    asked = prompts.read(loaded.task, file)
    session = DecodeSession(loaded, config, rows=num_samples * len(asked.canvases))
    asked.check(session)
    job = _Job(session, asked, num_samples, config.batch_size, trace)
    stdout = nullcontext((sys.stdout, 0))
    unfinished = stdout if out is None else open_unfinished(out, job.identity(), batch_size=config.batch_size)
    with unfinished as (target, num_done):
        if watch:
            session.watch(asked.canvases[:1], asked.keys[:1])
        _write(job, target, num_done, name="stdout" if out is None else target.name)


def _with_forbidden(config: DecodeConfig, task: Task, texts: list[str]) -> DecodeConfig:
    ids = {options.token(task, text) for text in texts}
    return config.model_copy(update={"forbid": sorted(ids.union(config.forbid))})


def _check_samples(num_samples: int, config: DecodeConfig) -> None:
    if num_samples > 1 and not config.is_random:
        raise UserError(
            f"--n {num_samples}: with decode.temperature=0 all answers to a prompt are the same; draw them with "
            "--decoder temperature=1, or leave out --n"
        )


@dataclass(frozen=True)
class _Job:
    session: DecodeSession
    asked: Prompts
    num_samples: int
    batch_size: int
    with_trace: bool

    def identity(self) -> dict[str, Any]:
        """Returns all that the answers depend on, as JSON."""
        run, asked = self.session.run, self.asked
        return {
            "checkpoint": run.digest(),
            "weights": run.weights,
            "prompts": digest(asked.canvases.numpy(), asked.keys.numpy()),
            "decoder": self.session.settings.model_dump(mode="json"),
            "n": self.num_samples,
            "trace": self.with_trace,
        }

    def batches(self, update: Callable[[int], None], start: int) -> Iterator[list[dict[str, Any]]]:
        """Yields the records of each batch from row `start` on; calls `update` with the positions filled in so far."""
        decode = self.session.trace if self.with_trace else self.session.decode
        before = 0
        for rows in self.asked.rows(self.num_samples, self.batch_size, start):
            started = time.perf_counter()
            answers = decode(rows.canvases, rows.keys, _shifted(update, before))
            seconds = round((time.perf_counter() - started) / len(answers), 6)
            before += int((rows.canvases == self.session.decoder.mask_id).sum())
            yield [
                self._record(*row, seconds) for row in zip(rows.canvases, rows.samples.tolist(), answers, strict=True)
            ]

    def _record(self, prompt: Tensor, sample: int, answer: Answer, seconds: float) -> dict[str, Any]:
        task = self.session.run.task
        text = getattr(task, "text", None)
        return (
            task.record(prompt, answer.tokens)
            | ({"sample": sample} if self.num_samples > 1 else {})
            | {"nfe": answer.nfe, "seconds": seconds, "tokens": answer.tokens.tolist()}
            | ({} if text is None else {"canvas": text(answer.tokens)})
            | ({} if answer.steps is None else {"trace": answer.steps})
        )


def _shifted(update: Callable[[int], None], start: int) -> Callable[[int], None]:
    return lambda done: update(start + done)


def _write(job: _Job, target: TextIO, num_done: int, name: str) -> None:
    """Writes batch after batch, so that Ctrl-C keeps those that are done; `num_done` rows are there already."""
    rows = len(job.asked.canvases) * job.num_samples
    if num_done:
        console.print(f"Going on with {name}: {num_done} of {rows} answers are there")
    masked = (job.asked.canvases == job.session.decoder.mask_id).sum(dim=-1).repeat_interleave(job.num_samples)
    total = int(masked[num_done:].sum())
    try:
        with progress("Decoding", total, is_shown=not target.isatty()) as update:  # or the bar is in the answers' way
            for records in job.batches(update, num_done):
                target.write("".join(to_json(record) + "\n" for record in records))
                target.flush()
                num_done += len(records)
    except KeyboardInterrupt:
        how = "" if name == "stdout" or not num_done else "; the same command goes on from there"
        raise Interrupted(f"Interrupted: {num_done} of {rows} answers are written to {name}{how}") from None
