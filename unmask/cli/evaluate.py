"""`unmask eval`."""

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.table import Table

from unmask.cli import options
from unmask.cli.text_measures import TextOptions, TextWork
from unmask.config.registry import resolve
from unmask.config.run import RunConfig
from unmask.config.settings import check_section
from unmask.decoding.config import DecodeConfig, check_guidance
from unmask.errors import UserError
from unmask.evaluation.evaluate import Evaluation
from unmask.evaluation.evaluate import evaluate as evaluate_model
from unmask.progress import progress
from unmask.tasks.task import build_task, is_graded
from unmask.training.loading import LoadedRun
from unmask.types import CleanBatch


def evaluate(
    run: options.Run,
    data: Annotated[
        Path | None, typer.Option(help="File of examples to evaluate on (default: the run's held-out examples).")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Task of the examples, such as gsm8k (default: the run's).")] = None,
    decoder: Annotated[list[str] | None, typer.Option(help=options.DECODER_HELP + " May be repeated.")] = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="Number of examples (default: all of a file, or eval.examples).")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="New file of JSON lines: each example, its answer and its grades; or each sample (default: none)."
        ),
    ] = None,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            help="For text: another corpus (file, folder or store) for zero-shot perplexity, on --examples or "
            "eval.examples rows of it. May be repeated."
        ),
    ] = None,
    generative: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="For text: draw samples with --decoder, and score them under the Hugging Face model in FOLDER.",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Samples to draw (default: 64; with --prompts, 1 for each prompt).")
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help="Prompts that samples fill in, as in `unmask decode`."),
    ] = None,
    weights: options.Weights = None,
    step: options.Step = "last",
    device: options.Device = None,
    as_json: options.AsJson = False,
    trust_code: options.TrustCode = False,
) -> None:
    """Evaluate a run: NELBO under uniform masks (for a causal model the exact NLL), and accuracy for each decoder; for
    running text also perplexity and bits per byte.

    Examples:

    * `unmask eval runs/sudoku-puma`

    * `unmask eval runs/sudoku-puma --decoder margin --decoder prob,tokens_per_step=3 --json`

    * `unmask eval runs/sudoku-puma --data hard.csv --step best`

    * `unmask eval runs/tinygsm-puma --task gsm8k --data test.jsonl --out answers.jsonl`

    * `unmask eval runs/text-bell --corpus reviews.jsonl --corpus speeches/ --generative models/gpt2-large`
    """
    loaded = LoadedRun.open(run, weights=options.check_weights(weights), step=step, device=device)
    config = loaded.config if task is None else _with_task(loaded.config, task)
    judge = build_task(config)
    asked = TextOptions(corpus or [], generative, samples, prompt_file, decoder or [])
    text = asked.check(judge, config)
    decoders = _decoders(config, decoder or [], out) if generative is None else []
    for each in decoders:
        check_guidance(each, config.data)
    chosen = (
        judge.validation(examples or config.eval.examples)
        if data is None
        else judge.examples_from_file(data)[:examples]
    )
    drawing = asked.decode_config(config, is_causal=loaded.model.is_causal)
    used = [drawing] if generative is not None else decoders
    model = loaded.prepare(dtype=_check_decoders(used), is_compiled=any(decoder.compile for decoder in used))
    draws = config.eval.nelbo_draws
    limit, given = examples or config.eval.examples, None if data is None else chosen
    work = None if text is None else TextWork.of(asked, text, model, drawing, limit=limit, data=given)
    with nullcontext() if out is None else options.new_file(out) as answers:
        with progress(f"Evaluating {run}", len(chosen) * len(decoders)) as update:
            result = evaluate_model(model, judge, chosen, decoders, nelbo_draws=draws, update=update)
        found = None if work is None else work.do(model, nelbo_draws=draws)
        if answers is not None:
            _write(result, answers)
            if found is not None:
                found.write(answers)
    protocol = _protocol(loaded, config, chosen, decoders, result) | {
        "run": str(run),
        "dtype": model.compute_dtype,
        "data": "validation" if data is None else str(data),
    }
    if as_json:
        options.print_json(_as_dict(result) | ({} if found is None else found.as_dict()) | {"protocol": protocol})
    else:
        _print_table(result, protocol)
        if found is not None:
            found.print()


def _protocol(
    loaded: LoadedRun,
    config: RunConfig,
    examples: CleanBatch,
    decoders: list[DecodeConfig],
    result: Evaluation,
) -> dict[str, Any]:
    """What was evaluated, and how."""
    return {
        "step": loaded.step,
        "weights": loaded.weights,
        "task": config.task.name,
        "data_sha256": _sha256(examples),
        "examples": len(examples),
        "nelbo": _how(result, config.eval.nelbo_draws),
        **({} if result.text is None else {"rows": result.text.rows}),
        "decoders": {decoder.label: decoder.model_dump(mode="json") for decoder in decoders},
    }


def _decoders(config: RunConfig, asked: list[str], out: Path | None) -> list[DecodeConfig]:
    if is_graded(config):
        return [options.parse_decoder(text, config.decode) for text in asked] or config.eval.decoders(config.decode)
    for option, value in (("--decoder", asked), ("--out", out)):
        if value:
            raise UserError(
                f"{option}: the task {config.task.name} has no right answers, so nothing is decoded here; leave it "
                "out, and see what the model writes with `unmask decode`, or score samples with --generative FOLDER"
            )
    return []


def _write(result: Evaluation, target: TextIO) -> None:
    for label, measured in result.accuracy.items():
        for number, record in enumerate(measured.records):
            target.write(json.dumps({"example": number, "decoder": label} | record) + "\n")


def _with_task(config: RunConfig, task: str) -> RunConfig:
    """The run's settings of the data, read as those of `task`."""
    section = resolve("task", task).Config
    given = {key: value for key, value in config.data.model_dump().items() if key in section.model_fields}
    choice = config.task.model_copy(update={"name": task})
    return config.model_copy(update={"task": choice, "data": check_section(section, given, f"--task {task}: data")})


def _sha256(examples: CleanBatch) -> str:
    """Of the examples themselves: prompts, and answers as far as they are known."""
    digest = hashlib.sha256(examples.x0.numpy().tobytes() + examples.prompt_mask.numpy().tobytes())
    digest.update(json.dumps(examples.answers).encode())
    return digest.hexdigest()


def _how(result: Evaluation, draws: int) -> str:
    if result.nelbo is None:
        return "none: the answers are not known as tokens"
    if result.is_exact:
        return "exact NLL of a causal model; nats per maskable token"
    return f"uniform masks, {draws} per example; nats per maskable token"


def _check_decoders(decoders: list[DecodeConfig]) -> str | None:
    """The number format that all of them ask for."""
    labels = [config.label for config in decoders]
    if repeated := {label for label in labels if labels.count(label) > 1}:
        raise UserError(f"--decoder: {', '.join(sorted(repeated))} is asked for twice")
    first, *others = {config.dtype for config in decoders} or {None}
    if others:
        raise UserError(f"--decoder: one evaluation runs in one dtype, not in {first} and {others[0]}; run it twice")
    return first


def _as_dict(result: Evaluation) -> dict[str, Any]:
    accuracy = result.accuracy
    return {
        **({"nelbo": None, "nelbo_stderr": None} | result.likelihoods()),
        "accuracy": {label: measured.accuracy for label, measured in accuracy.items()},
        "accuracy_stderr": {label: measured.stderr for label, measured in accuracy.items()},
        "interval": {label: list(measured.interval) for label, measured in accuracy.items()},
        "shares": {label: measured.shares for label, measured in accuracy.items()},
        "reasons": {label: measured.reasons for label, measured in accuracy.items() if measured.reasons},
        "nfe": {label: measured.nfe for label, measured in accuracy.items()},
    }


def _print_table(result: Evaluation, protocol: dict[str, Any]) -> None:
    out = options.results()
    out.print(
        f"{protocol['run']}, step {protocol['step']}, {protocol['weights']} weights, {protocol['examples']} examples"
    )
    if result.accuracy:
        out.print(_accuracy_table(result))
    for label, measured in result.accuracy.items():
        if measured.reasons:
            out.print(f"{label}: " + ", ".join(f"{count} {reason}" for reason, count in measured.reasons.items()))
    if result.nelbo is not None:
        nelbo = result.nelbo
        out.print(f"{result.likelihood} {nelbo.value:.4f} ± {nelbo.stderr:.4f} nats per maskable token")
    if result.text is not None:
        bound = "" if result.is_exact else " at most"
        ppl, bits = f"{result.text.ppl:.2f} per token", f"{result.text.bits_per_byte:.3f} bits per byte"
        out.print(f"Perplexity{bound} {ppl} (rows: {result.text.rows});{bound} {bits}")


def _accuracy_table(result: Evaluation) -> Table:
    measures = list(next(iter(result.accuracy.values())).shares)
    table = Table()
    for column in ("decoder", measures[0], "95 % interval", *measures[1:], "NFE"):
        table.add_column(column, justify="left" if column == "decoder" else "right")
    for label, measured in result.accuracy.items():
        first, *others = (f"{share:.1%}" for share in measured.shares.values())
        low, high = measured.interval
        table.add_row(label, first, f"{low:.1%} to {high:.1%}", *others, f"{measured.nfe:.1f}")
    return table
