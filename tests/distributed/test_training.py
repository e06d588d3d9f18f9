"""Two processes train as one does: gradients, pools and weights; and go on with what either has saved."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed import damaged_shards, train_cases
from tests.distributed.launching import launch
from tests.distributed.train_cases import (
    CASES,
    HALF,
    STEPS,
    WORLD,
    canvases,
    kept,
    make,
    train_in_halves,
    train_second_half,
)
from tests.helpers import assert_same

# Dropout draws for each process's rows, so it alone depends on how many there are.
SAME = [case for case in CASES if case != "dropout"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process wrote, and two."""
    folder = tmp_path_factory.mktemp("trained")
    for case in CASES:
        train_in_halves(case, folder / case / "one")
    launched = launch([[train_cases.__name__, str(folder)]] * WORLD, folder / "logs")
    assert launched.wait() == [0] * WORLD, launched.said(0)[-5000:] + launched.said(1)[-5000:]
    return folder


def assert_near(ours: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    """In fp64; Adam's first steps enlarge rounding, as they divide by a gradient that may be near 0."""
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].dtype == torch.float64
        assert torch.allclose(ours[name], value, rtol=0, atol=atol), name


def assert_same_training(case: str, ours: dict, expected: dict) -> None:
    """Pools and masks exactly, and so what was seen; weights to 1e-9."""
    pools = [dict(state["process"]) for state in (ours, expected)]
    estimates = [pool.pop("estimate", None) for pool in pools]
    assert_same(*pools)
    if estimates[1] is not None:  # what a model says is as near as its weights
        assert torch.allclose(*estimates, rtol=0, atol=1e-9)
    assert_near(ours["model"], expected["model"], atol=1e-9)
    assert_near(ours["ema"]["shadow"], expected["ema"]["shadow"], atol=1e-9)
    assert ours["extra"]["losses"] == pytest.approx(expected["extra"]["losses"], rel=1e-9)
    assert ours["extra"]["metrics"] == expected["extra"]["metrics"]
    assert ours["extra"]["examples"] == expected["extra"]["examples"]


@pytest.mark.parametrize("case", SAME)
def test_two_processes_find_the_raw_gradients_of_one(folder: Path, case: str) -> None:
    """Raw, as Adam hides a wrong factor; where they are clipped, by the norm of all."""
    ours, expected = (load_file(folder / case / who / "gradients.safetensors") for who in ("two", "one"))
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(ours[name], value, rtol=0, atol=1e-12), name


@pytest.mark.parametrize("case", SAME)
def test_two_processes_train_as_one(folder: Path, case: str) -> None:
    for step in (HALF, STEPS):
        assert_same_training(case, kept(folder / case / "two", step), kept(folder / case / "one", step))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_go_on_exactly(folder: Path, case: str) -> None:
    for step in (HALF, STEPS):
        ours, expected = (kept(folder / case / who, step) for who in ("two_again", "two"))
        if step == HALF:
            del ours["extra"], expected["extra"]
        assert_same(ours, expected)


@pytest.mark.parametrize("case", SAME)
def test_two_processes_go_on_with_what_one_saved(folder: Path, case: str) -> None:
    loaded, saved = (kept(folder / case / who, HALF) for who in ("two_from_one", "one"))
    for part in ("model", "optimizer", "ema", "process"):
        assert_same(loaded[part], saved[part])
    assert_same_training(case, kept(folder / case / "two_from_one", STEPS), kept(folder / case / "one", STEPS))


@pytest.mark.parametrize("case", SAME)
def test_one_process_goes_on_with_what_two_saved(folder: Path, tmp_path: Path, case: str) -> None:
    train_second_half(case, folder / case / "two", tmp_path)
    loaded, saved = kept(tmp_path, HALF), kept(folder / case / "two", HALF)
    for part in ("model", "optimizer", "ema", "process"):
        assert_same(loaded[part], saved[part])
    assert_same_training(case, kept(tmp_path, STEPS), kept(folder / case / "one", STEPS))


def test_a_model_in_shares_answers_as_a_whole_one(folder: Path) -> None:
    trainer = make("puma, shards")
    trainer.model.eval()
    xt, at = canvases(trainer)
    with torch.no_grad():
        confidence, logits = trainer.model.predict(xt, at).confidence, trainer.model.logits(xt, at)
    for rank in range(WORLD):
        found = load_file(folder / f"answers_{rank}.safetensors")
        assert torch.allclose(found["together"], confidence, rtol=1e-12)
        assert torch.allclose(found["alone"], logits, rtol=1e-12)
        assert torch.equal(found["again"], found["together"])


@pytest.mark.parametrize("name", damaged_shards.DAMAGES)
def test_damaged_shards_are_refused_by_file_before_anything_is_loaded(folder: Path, name: str) -> None:
    """By both processes, although the damage is in what one of them would read."""
    for rank in range(WORLD):
        found = json.loads((folder / "damaged" / f"said_{rank}.json").read_text())
        assert found["is_same"]
        assert damaged_shards.DAMAGES[name][0] in (found["said"][name] or "it was taken")
