"""What a page says of its runs, in words."""

from collections.abc import Sequence
from typing import Any

from unmask.report.chart import legend_mark
from unmask.report.runs import Methods, Recorded, differences
from unmask.section import flatten


def summary(methods: Methods) -> str:
    task = next(iter(methods.values()))[0].config.task.name
    fewest, most = (pick(len(runs) for runs in methods.values()) for pick in (min, max))
    seeds = f"{fewest} to {most} seeds each" if fewest < most else f"{most} seeds each" if most > 1 else "one seed each"
    return f"{' and '.join(methods)} on the task {task}, {seeds}."


def method(name: str, number: int, runs: Sequence[Recorded]) -> dict[str, Any]:
    process = dict(flatten(runs[0].config.process.model_dump(exclude_none=True)))
    settings = ", ".join(f"{key} {value}" for key, value in process.items() if key != "name" and value != [])
    return {
        "name": name,
        "mark": legend_mark(number),
        "note": f"process {process['name']}" + (f" ({settings})" if settings else ""),
    }


def warnings(methods: Methods) -> list[str]:
    """What a reader must know before comparing."""
    runs = [run for same in methods.values() for run in same]
    found = [f"{run.folder} was still training, at step {run.last_step}." for run in runs if run.is_running]
    if len({run.last_step for run in runs}) > 1:
        said = ", ".join(f"{run.folder} {run.last_step:,}" for run in runs)
        found.append(f"The runs were not trained for the same number of steps: {said}.")
    if any(len({run.settings[key] for run in runs}) > 1 for key in ("eval.examples", "eval.nelbo_draws")):
        found.append("The runs were evaluated on different numbers of examples or masks.")
    if any(key.startswith("data.") for key in differences(methods)):
        found.append("The settings of the data differ, so that held-out examples may differ too.")
    if min(len(same) for same in methods.values()) < 3 and len(methods) > 1:
        found.append("Fewer than three seeds of a method: a difference may be chance.")
    return found


def curves_note(methods: Methods) -> str:
    has_seeds = any(len(runs) > 1 for runs in methods.values())
    is_causal = any(getattr(runs[0].config.model, "causal", False) for runs in methods.values())
    return (
        ("Thick lines are means over seeds, thin ones the seeds. " if has_seeds else "")
        + "Of held-out examples. Seconds are of training, without evaluations, on the machines below. "
        "A NELBO is taken under uniform masks, whatever a method trains on"
        + ("; of a causal model it is the exact NLL." if is_causal else ".")
    )


def command(run: Recorded) -> str:
    return str(run.environment.get("command") or f"# {run.folder}: its command was not recorded")


def run(run: Recorded) -> dict[str, str]:
    last, at = run.rows[-1], run.environment
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
        "machine": ", ".join(str(part) for part in parts if part),
    }
