"""The amounts that a run says it has spent: passes against the positions that were read, seconds by a clock of ours."""

import json
from pathlib import Path

import pytest

from tests.helpers import lines
from tests.helpers.runs import tiny_run, toy_trainer
from unmask.training import evaluating, state
from unmask.training.logging import NonFiniteMonitor
from unmask.training.run import Run
from unmask.training.trainer import Trainer

METHODS = {
    "uniform": (["process.name=uniform"], 1),
    "puma": ([], 1),
    "accumulated": (["train.accumulate=3"], 1),
    "autoregressive": (["process={name: ar}", "model.causal=true", "model.alignment=next"], 1),
    "blocks": (["process={name: uniform, block_size: 2}"], 10 / 6),
    "blocks of PUMA": (["process={name: puma, num_stages: 2, block_size: 3}"], 9 / 6),
    "self-conditioned": (["process.name=uniform", "model.self_conditioning=true"], 1.5),
    "self-conditioned, accumulated": (
        ["process.name=uniform", "model.self_conditioning=true", "train.accumulate=2"],
        1.5,
    ),
    "self-conditioned blocks": (["process={name: uniform, block_size: 2}", "model.self_conditioning=true"], 15 / 6),
    "self-conditioned PUMA, whose estimate comes back": (["model.self_conditioning=true"], 1),
}


@pytest.mark.parametrize(("settings", "per_step"), METHODS.values(), ids=METHODS.keys())
def test_passes_are_the_positions_read_over_those_of_the_batch(settings: list[str], per_step: float) -> None:
    """Four steps of 12 rows of 6 positions. Every position that a network reads goes through its embedding."""
    trainer = toy_trainer("data.prompt_length=1", *settings) if "next" in str(settings) else toy_trainer(*settings)
    read = 0

    def count(_: object, given: tuple) -> None:
        nonlocal read
        read += given[0].numel()

    trainer.model.backbone.embedding.register_forward_pre_hook(count)
    passes = sum(trainer.step().passes for _ in range(4))
    assert passes == pytest.approx(read / (12 * 6))
    assert passes == pytest.approx(4 * per_step)


def test_a_layer_counts_each_time_that_it_runs() -> None:
    """Two layers, of which the second is run as often as is drawn."""
    loops = "model.loops={layers: [1, 1], times: [1, 4]}"
    trainer = toy_trainer("process.name=uniform", "model.num_layers=2", "train.compile=false", loops)
    run = 0

    def count(*_: object) -> None:
        nonlocal run
        run += 1

    for block in trainer.model.backbone.blocks:
        block.register_forward_pre_hook(count)
    passes = [trainer.step().passes for _ in range(5)]
    assert sum(passes) == run / 2
    assert len(set(passes)) > 1


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    out, settings = tmp_path / "run", ["process.name=uniform", "model.self_conditioning=true"]
    tiny_run(out, "optim.schedule=constant", *settings).train()
    tiny_run(out, "optim.schedule=constant", *settings, "train.steps=6").train(resume=True)
    passes = {row["step"]: row["passes"] for row in lines(out / "metrics.jsonl")}
    assert [passes[step] for step in (2, 4, 6)] == [3, 6, 9]


def test_a_run_that_began_before_they_were_counted_does_not_count_half(tmp_path: Path) -> None:
    out = tmp_path / "run"
    tiny_run(out, "optim.schedule=constant").train()
    saved = next((out / "checkpoints").glob("*/state.json"))
    held = json.loads(saved.read_text())
    del held["progress"]["passes"]
    assert state.Progress.read(held["progress"], "here").passes is None
    progress = state.Progress.read(held["progress"], "here")
    progress.count_step(1.0)
    assert "passes" not in progress.spent(10)


def test_seconds_are_those_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a second to queue and ten more until the monitor has waited for it; an evaluation takes a thousand.

    On a GPU most of a step's time passes in that wait.
    """
    now = 0.0

    def taking(seconds: float, own):  # type: ignore[no-untyped-def]
        def timed(*args: object, **options: object):  # type: ignore[no-untyped-def]
            nonlocal now
            now += seconds
            return own(*args, **options)

        return timed

    monkeypatch.setattr(state.time, "perf_counter", lambda: now)
    monkeypatch.setattr(Trainer, "step", taking(1, Trainer.step))
    monkeypatch.setattr(NonFiniteMonitor, "add", taking(10, NonFiniteMonitor.add))
    monkeypatch.setattr(evaluating, "evaluate", taking(1000, evaluating.evaluate))
    monkeypatch.setattr(Run, "_save", taking(1000, Run._save))
    tiny_run(tmp_path / "run", "eval.every=1").train()
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert {row["step"]: row["seconds"] for row in rows} == {step: 11.0 * step for step in (1, 2)}
