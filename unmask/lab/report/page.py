"""Builds the report: one self-contained HTML page that shows runs side by side."""

import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import resources
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from unmask.config.settings import flatten
from unmask.decoding.config import DecodeConfig
from unmask.formats import printable, to_json, to_yaml_line
from unmask.lab.compare import AXIS_NAMES, Comparison, CostRow
from unmask.lab.report.chart import Chart, Level, Line, Points, legend_mark, shown, thin
from unmask.lab.report.curves import Curve, is_finite
from unmask.lab.report.diagnoses import Diagnoses, charts, diagnose_methods, overfitting
from unmask.lab.report.measures import Measure
from unmask.lab.report.models import Study
from unmask.lab.report.models import study as study_methods
from unmask.lab.report.runs import RunRecord, RunsByMethod, common_measures, differing_settings
from unmask.progress import progress, warn
from unmask.tasks.task import is_graded

_X_LABELS = {
    "step": "training steps",
    "seconds": "seconds of training",
    "passes": "forward passes of training",
    "examples_seen": "examples drawn",
}


def build(
    methods: RunsByMethod,
    decoder: DecodeConfig,
    *,
    title: str,
    first_measure: str | None,
    num_examples: int,
    parts: Sequence[str],
    commands: Sequence[str],
) -> str:
    """Decodes with the runs' models, diagnoses the runs, and renders the page.

    Args:
        decoder: of the replay, and of the masks that training is compared with.
        first_measure: shown before the other measures.
        num_examples: held-out examples to replay.
        parts: diagnostics to run.
        commands: shown on the page after the commands of the runs.
    """
    with progress("Decoding for the replay", num_examples * len(methods)) as update:
        studied = study_methods(methods, decoder, num_examples=num_examples, warn=warn, on_example=update)
    with progress("Diagnosing", 100 * len(parts) * len(methods)) as update:
        diagnoses = diagnose_methods(
            methods, decoder, parts, warn=warn, on_progress=lambda done: update(round(100 * done))
        )
    return render(methods, studied, diagnoses, title=title, first_measure=first_measure, commands=commands)


def render(
    methods: RunsByMethod,
    study: Study,
    diagnoses: Diagnoses,
    *,
    title: str,
    first_measure: str | None,
    commands: Sequence[str],
) -> str:
    """Renders the page. `first_measure` is shown before the other measures that all runs have.

    Raises:
        UserError: the runs have no evaluation in common.
    """
    measures = common_measures(methods)
    measures.sort(key=lambda measure: measure != first_measure)  # a stable sort
    has_shares = any(key.startswith("eval/accuracy/") for key in measures)
    replay = study.replay and Markup(  # escaped so that it cannot end the script element that holds it
        to_json(_printable(study.replay), separators=(",", ":")).replace("<", "\\u003c")
    )
    differences = _written([runs[0].effective for runs in methods.values()], differing_settings(methods))
    css, script = (Markup(_asset(name)) for name in ("page.css", "page.js"))
    environment = Environment(
        loader=PackageLoader("unmask.lab.report", "assets"),
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=title,
        policy=f"default-src 'none'; style-src {_source(css)}; script-src {_source(script)}; "
        "base-uri 'none'; form-action 'none'",
        css=css,
        script=script,
        summary=summary(methods),
        warnings=warnings(methods),
        methods=[
            describe_method(name, number, runs, differences) for number, (name, runs) in enumerate(methods.items())
        ],
        others=list(methods)[1:],
        measures=[_measure(methods, own, has_costs=own == first_measure or not has_shares) for own in measures],
        curves_note=curves_note(methods),
        replay=replay,
        is_graded=is_graded(next(iter(methods.values()))[0].config),
        num_puzzles=0 if study.replay is None else len(study.replay["puzzles"]),
        missing=study.missing,
        decoder=study.decoder,
        mask_charts=_mask_charts(methods, study),
        diagnosis_charts=charts(methods, diagnoses),
        overfitting=overfitting(diagnoses),
        undiagnosed=diagnoses.missing,
        differences=differences,
        protocols=protocols(study.evaluations),
        protocol_files=protocol_files(study.evaluations),
        not_described=study.not_described,
        runs=[describe_run(run) for runs in methods.values() for run in runs],
        claims=list(dict.fromkeys(run_command(run) for runs in methods.values() for run in runs)),
        commands=list(commands),
    )


def _asset(name: str) -> str:
    return resources.files("unmask.lab.report").joinpath("assets", name).read_text(encoding="utf-8")


def _source(inline: str) -> str:
    """Names an inline style or script in the page's policy, by its digest: nothing else is applied or run."""
    return f"'sha256-{b64encode(sha256(inline.encode()).digest()).decode()}'"


def _printable(value: Any) -> Any:
    """Makes all text within the replay printable, which the page's script shows as it is."""
    if isinstance(value, Mapping):
        return {key: _printable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(inner) for inner in value] if value and not isinstance(value[0], int) else value
    return printable(value) if isinstance(value, str) else value


# --- words ------------------------------------------------------------------------------------------------------------


def summary(methods: RunsByMethod) -> str:
    task = next(iter(methods.values()))[0].config.task.name
    fewest, most = (pick(len(runs) for runs in methods.values()) for pick in (min, max))
    seeds = f"{fewest} to {most} seeds each" if fewest < most else f"{most} seeds each" if most > 1 else "one seed each"
    return f"{' and '.join(methods)} on the task {task}, {seeds}."


def describe_method(
    name: str, number: int, runs: Sequence[RunRecord], differences: Mapping[str, Sequence[str | None]]
) -> dict[str, Any]:
    """Describes a method for the legend: its process, and its model and optimizer where methods differ in them."""
    process = dict(flatten(runs[0].config.process.model_dump(mode="json", exclude_none=True)))
    settings = [f"{key} {to_yaml_line(value)}" for key, value in process.items() if key != "name" and value != []]
    own = {
        key: values[number] for key, values in differences.items() if key.startswith("model.") or key == "optim.name"
    }
    note = f"process {process['name']}" + (f" ({', '.join(settings)})" if settings else "")
    others = [f"{key} {text}" for key, text in own.items() if text not in (None, "null")]
    return {"name": name, "mark": legend_mark(number), "note": ", ".join([note, *others])}


def warnings(methods: RunsByMethod) -> list[str]:
    """Lists the warnings that a reader needs before comparing."""
    runs = [run for same in methods.values() for run in same]
    found = [f"{run.folder} was still training, at step {run.last_step}." for run in runs if run.is_running]
    if len({run.last_step for run in runs}) > 1:
        said = ", ".join(f"{run.folder} {run.last_step:,}" for run in runs)
        found.append(f"The runs were not trained for the same number of steps: {said}.")
    if any(len({run.settings[key] for run in runs}) > 1 for key in ("eval.examples", "eval.nelbo_draws")):
        found.append("The runs were evaluated on different numbers of examples or masks.")
    if any(key.startswith("data.") for key in differing_settings(methods)):
        found.append("The settings of the data differ, so that held-out examples may differ too.")
    if min(len(same) for same in methods.values()) < 3 and len(methods) > 1:
        found.append("Fewer than three seeds of a method: a difference may be chance.")
    return found


def curves_note(methods: RunsByMethod) -> str:
    has_seeds = any(len(runs) > 1 for runs in methods.values())
    is_causal = any(getattr(runs[0].config.model, "causal", False) for runs in methods.values())
    return (
        ("Thick lines are means over seeds, thin ones the seeds. " if has_seeds else "")
        + "Of held-out examples. Seconds are of training, without evaluations and compilation: they depend on the "
        "machines below, and on what else ran there, such as runs beside each other (--jobs). Passes are forward "
        "passes of a method's own network over a batch: blocks take almost two a step, self-conditioning 1.5, layers "
        "in a loop more. "
        "A NELBO is taken under uniform masks, whatever a method trains on"
        + ("; of a causal model it is the exact NLL." if is_causal else ".")
    )


def run_command(run: RunRecord) -> str:
    """Returns the command that the run says it was made by, in one line."""
    command = run.environment.get("command")
    if not isinstance(command, str) or not command:
        return f"# {run.folder}: its command was not recorded"
    return _one_line(command, 2000)


def _one_line(text: str, most: int) -> str:
    line = printable(text[: most + 1]).replace("\n", "\\n").replace("\t", "\\t")
    return line if len(line) <= most else f"{line[:most]} .."


def describe_run(run: RunRecord) -> dict[str, str]:
    last, at = run.rows[-1], run.environment
    at = {key: value for key, value in at.items() if isinstance(value, str | int | float)}
    parts = [at.get("cpu") if at.get("device") == "cpu" else at.get("device")]
    parts += [f"{at['threads']} thread{'s' * (at['threads'] != 1)}"] if "threads" in at else []
    parts += [at.get("dtype"), "compiled" if at.get("compiled") else None]
    parts += [f"torch {at['torch']}"] if "torch" in at else []
    return {
        "folder": str(run.folder),
        "seed": str(run.seed),
        "steps": f"{last['step']:,}",
        "seconds": f"{last['seconds']:,.0f}",
        "examples": f"{last['examples_seen']:,}",
        "machine": ", ".join(_one_line(str(part), 100) for part in parts if part),
    }


# --- protocols -------------------------------------------------------------------------------------------------------


def _written(owners: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> dict[str, list[str | None]]:
    """Writes each owner's values of `keys` as a user would type them; None where there is no such key."""
    return {key: [to_yaml_line(own[key]) if key in own else None for own in owners] for key in keys}


def protocols(evaluations: dict[str, dict[str, Any]]) -> dict[str, list[str | None]]:
    """Returns every field of the protocols by its dotted key, each with every method's value (None without one)."""
    flat = [dict(flatten({**own["protocol"], "options": None})) for own in evaluations.values()]
    keys = dict.fromkeys(key for own in flat for key in own if key != "options")
    return _written(flat, keys)


def protocol_files(evaluations: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Returns each method's name, and the name and content (a data URL) of its file for `unmask eval --protocol`."""
    return [
        {
            "method": name,
            "file": f"{re.sub(r'[^A-Za-z0-9._+-]', '-', name)[-60:]}.json",
            "url": f"data:application/json;base64,{b64encode(to_json(own, indent=1).encode()).decode()}",
        }
        for name, own in evaluations.items()
    ]


# --- curves ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measure:
    """The part of the page on one measure: its charts, and the table of costs."""

    name: str
    charts: list[Chart]
    costs: list[CostRow]
    axes: list[str]
    finals: list[list[str]]
    """The rows of the table of last evaluations (`Comparison.finals`)."""


def _measure(methods: RunsByMethod, measure: str, *, has_costs: bool) -> _Measure:
    """Returns what the page shows of a measure; that of a likelihood has costs only if `has_costs`."""
    known, comparison = Measure.named(measure), Comparison.of(methods, measure)
    charts = [
        Chart(
            title=f"{known.name} against {_X_LABELS[axis]}",
            x_label=_X_LABELS[axis],
            y_label=known.unit,
            lines=[_line(label, number, each, axis) for number, (label, each) in enumerate(comparison.methods.items())],
            is_share=known.is_share,
            level=_level(methods, known),
        )
        for axis in comparison.axes
    ]
    is_compared = known.has_costs and (known.is_share or has_costs) and len(methods) > 1
    costs = [row for row in comparison.rows() if row.is_reached] if is_compared else []
    axes = [AXIS_NAMES[axis] for axis in comparison.axes]
    return _Measure(known.name, charts, costs, axes, comparison.finals())


def _level(methods: RunsByMethod, measure: Measure) -> Level | None:
    """Returns what a measure is held against, if that is the same for all runs."""
    values = {run.level(measure.level) for runs in methods.values() for run in runs}
    value = values.pop() if len(values) == 1 else None
    return None if value is None else Level(measure.level_name, value)


def _line(name: str, style: int, curves: Sequence[Curve], axis: str) -> Line:
    """Draws the mean over seeds, from the first step that all have evaluated to the last step of the shortest."""
    steps = sorted({step for curve in curves for step in curve.spent["step"]})
    low, high = max(c.spent["step"][0] for c in curves), min(c.spent["step"][-1] for c in curves)
    shared = thin([step for step in steps if low <= step <= high], most=2000)
    means = [tuple(each) for each in np.mean([curve.at(shared, axis) for curve in curves], axis=0).tolist()]
    seeds: list[Points] = [list(zip(c.spent[axis], c.values, strict=True)) for c in curves] if len(curves) > 1 else []
    return Line(name, style, means, seeds)


# --- masks -----------------------------------------------------------------------------------------------------------


def _mask_charts(methods: RunsByMethod, study: Study) -> list[Chart]:
    def lines(kind: str) -> list[Line]:
        found = []
        for number, name in enumerate(methods):
            if name in study.training_masks:
                found.append(Line(f"{name}, training", number, getattr(study.training_masks[name], kind)()))
            if name in study.decoding_masks:
                points = getattr(study.decoding_masks[name], kind)()
                found.append(Line(f"{name}, decoding", number, points, is_reference=True))
        return found

    over_training = [
        Line(
            name,
            number,
            [
                (float(row["step"]), float(row["train/top1"]))
                for row in runs[0].rows
                if is_finite(row.get("train/top1"))
            ],
        )
        for number, (name, runs) in enumerate(methods.items())
    ]
    masked = "masked share of all positions"
    return [
        Chart("How much is masked", masked, "share of canvases", lines("histogram"), is_share=True, is_x_share=True),
        Chart("How sure the model is, by how much is masked", masked, "mean top-1 probability", lines("confidence"),
              is_share=True, is_x_share=True),
        Chart("How sure it is of what it trains on, over training", "training steps", "mean top-1 probability",
              over_training, is_share=True),
    ]  # fmt: skip
