"""`unmask eval`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from unmask.cli import options
from unmask.config import DecodeConfig
from unmask.errors import UserError
from unmask.evaluation.evaluate import Evaluation
from unmask.evaluation.evaluate import evaluate as evaluate_model
from unmask.models.precision import parameter_dtype, resolve_dtype
from unmask.progress import console
from unmask.registry import resolve
from unmask.tasks.task import Task
from unmask.training import loading
from unmask.training.trainer import resolve_device


def evaluate(
    run: options.Run,
    data: Annotated[
        Path | None, typer.Option(help="Examples from a file; the run's held-out ones unless given.")
    ] = None,
    decoder: Annotated[list[str] | None, typer.Option(help=options.DECODER_HELP + " May be repeated.")] = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="How many; all of a file, or eval.examples, unless given.")
    ] = None,
    weights: options.Weights = None,
    step: options.Step = "last",
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Evaluate a run: NELBO under uniform masks, and accuracy for each decoder.

    Examples:

    * `unmask eval runs/sudoku-puma`

    * `unmask eval runs/sudoku-puma --decoder margin --decoder prob,tokens_per_step=3 --json`

    * `unmask eval runs/sudoku-puma --data hard.csv --step best`
    """
    source = loading.read(run, weights=options.check_weights(weights), step=step)
    config = source.config
    decoders = [options.parse_decoder(text, config.decode) for text in decoder or []] or config.eval.decoders(
        config.decode
    )
    task: Task = resolve("task", config.task.name).from_config(config.data)
    chosen = (
        task.validation(examples or config.eval.examples) if data is None else task.examples_from_file(data)[:examples]
    )
    place = resolve_device(device or config.train.device)
    dtype = resolve_dtype(_check_decoders(decoders) or config.train.dtype, place)
    model = source.model().to(place, parameter_dtype(dtype))
    if any(decoder.compile for decoder in decoders):
        model.compile_decoding()
    with console.status(f"Evaluating {run} on {len(chosen)} examples"):
        result = evaluate_model(model, task, chosen, decoders, nelbo_draws=config.eval.nelbo_draws, dtype=dtype)
    protocol = {
        "run": str(run),
        "step": source.step,
        "weights": source.weights,
        "dtype": dtype,
        "data": "validation" if data is None else str(data),
        "examples": len(chosen),
        "nelbo": f"uniform masks, {config.eval.nelbo_draws} per example; nats per maskable token",
        "decoders": {config.label: config.model_dump(mode="json") for config in decoders},
    }
    if as_json:
        options.print_json(_as_dict(result) | {"protocol": protocol})
    else:
        _print_table(result, protocol)


def _check_decoders(decoders: list[DecodeConfig]) -> str | None:
    """The number format that all of them ask for."""
    labels = [config.label for config in decoders]
    if repeated := {label for label in labels if labels.count(label) > 1}:
        raise UserError(f"--decoder: {', '.join(sorted(repeated))} is asked for twice")
    first, *others = {config.dtype for config in decoders}
    if others:
        raise UserError(f"--decoder: one evaluation runs in one dtype, not in {first} and {others[0]}; run it twice")
    return first


def _as_dict(result: Evaluation) -> dict[str, Any]:
    accuracy = result.accuracy
    return {
        "nelbo": result.nelbo.value,
        "nelbo_stderr": result.nelbo.stderr,
        "accuracy": {label: measured.accuracy for label, measured in accuracy.items()},
        "accuracy_stderr": {label: measured.stderr for label, measured in accuracy.items()},
        "shares": {label: measured.shares for label, measured in accuracy.items()},
        "nfe": {label: measured.nfe for label, measured in accuracy.items()},
    }


def _print_table(result: Evaluation, protocol: dict[str, Any]) -> None:
    measures = list(next(iter(result.accuracy.values())).shares)
    table = Table()
    for column in ("decoder", *measures, "NFE"):
        table.add_column(column, justify="left" if column == "decoder" else "right")
    for label, measured in result.accuracy.items():
        shares = [f"{share:.1%}" for share in measured.shares.values()]
        shares[0] += f" ± {measured.stderr:.1%}"
        table.add_row(label, *shares, f"{measured.nfe:.1f}")
    out = options.results()
    out.print(
        f"{protocol['run']}, step {protocol['step']}, {protocol['weights']} weights, {protocol['examples']} examples"
    )
    out.print(table)
    out.print(f"NELBO {result.nelbo.value:.4f} ± {result.nelbo.stderr:.4f} nats per maskable token")
