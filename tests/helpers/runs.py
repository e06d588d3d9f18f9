"""Small runs that several tests share."""

import copy
import json
from pathlib import Path
from typing import Any

from tests.helpers import lines, run_cli
from unmask.config import recipes
from unmask.tasks.toy import Toy
from unmask.training.folder import RunFolder, to_yaml
from unmask.training.run import Run
from unmask.training.trainer import Trainer

TWO_STEPS = [
    *("task.name=toy", "model.dim=8", "model.num_layers=1", "model.num_heads=1", "process={name: puma, num_stages: 2}"),
    *("train.batch_size=4", "train.steps=2", "train.checkpoint_every=1", "train.keep_last=1", "eval.every=99"),
    *("eval.examples=1", "log.every=1", "log.tensorboard=false"),
]
TWELVE_STEPS = ["train.steps=12", "train.checkpoint_every=6", "eval.every=4", "eval.examples=4", "log.every=1"]
TOY = ["task.name=toy", "data={values: 3, length: 6}", "train.batch_size=12", "train.dtype=float64"]
ACCURACY = {"eval/accuracy": 0.5, "eval/accuracy/ema/prob/3": 0.5, "eval/nelbo": 1.0, "eval/nelbo_stderr": 0.1}


def tiny_run(out: Path, *settings: str) -> Run:
    """Makes a run of two steps, with the smallest model there can be."""
    return Run(recipes.load("debug", [*TWO_STEPS, *settings]), RunFolder(out))


def debug_run(out: Path, *settings: str) -> Run:
    """Makes a run of twelve steps of the recipe `debug`."""
    return Run(recipes.load("debug", [*TWELVE_STEPS, "log.tensorboard=false", *settings]), RunFolder(out))


def toy_trainer(*overrides: str) -> Trainer:
    """Makes a trainer of the toy task in double precision."""
    config = recipes.load("debug", [*TOY, *overrides])
    task = Toy.from_config(config.data)
    return Trainer(config, task.tokens, task.train_stream(config.train.seed))


def assert_goes_on_exactly(trainer: Trainer, other: Trainer) -> dict[str, Any]:
    """Checks that `other` takes the same steps from the state of `trainer`, which it returns."""
    for _ in range(3):
        trainer.step()
    state = copy.deepcopy(trainer.state_dict())
    expected = [trainer.step().loss.item() for _ in range(3)]
    other.load_state_dict(state)
    assert [other.step().loss.item() for _ in range(3)] == expected
    return state


def write_run(folder: Path, *settings: str, evaluation: dict | None = None) -> Path:
    """Writes the files of a run that was evaluated once."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(recipes.load("debug", settings)))
    row = {"step": 5, "seconds": 1.5, "examples_seen": 80} | (ACCURACY if evaluation is None else evaluation)
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def decode_prompts(run: Path, folder: Path, prompts: list[Any], *arguments: object) -> list[dict[str, Any]]:
    """Runs `unmask decode` and returns its records, without the seconds."""
    file, out = folder / "prompts.jsonl", folder / "out.jsonl"
    file.write_text("".join((p if isinstance(p, str) else json.dumps(p)) + "\n" for p in prompts))
    out.unlink(missing_ok=True)
    assert run_cli("decode", run, file, "--out", out, *arguments) == 0
    records = lines(out)
    assert all(record.pop("seconds") > 0 for record in records)
    return records
