"""What `test_compiled.py` runs in a process without shape checks: they cannot be compiled."""

import pytest
import torch
from torch._dynamo.utils import counters

from tests.helpers import SHORT
from unmask import recipes
from unmask.models import compiling
from unmask.registry import resolve
from unmask.training.trainer import Trainer

CPU = torch.device("cpu")


def trainer(*settings: str) -> Trainer:
    config = recipes.load("debug", [*SHORT, "model.num_layers=1", *settings])
    task = resolve("task", config.task.name).from_config(config.data)
    return Trainer(config, task.tokens, task.synthetic_stream(0))


@pytest.fixture
def needs_compiler() -> None:
    if not compiling.should_compile("auto", CPU):
        pytest.skip("no compiler")


def warmed_up(*settings: str) -> Trainer:
    torch._dynamo.reset()
    compiled = trainer("train.compile=true", *settings)
    compiled.warm_up()
    return compiled


@pytest.mark.usefixtures("needs_compiler")
def test_compiled_steps_are_the_plain_ones_and_compile_once() -> None:
    plain, compiled = trainer(), warmed_up()
    assert not plain.is_compiled
    assert compiled.is_compiled
    graphs = counters["stats"]["unique_graphs"]
    for _ in range(6):
        assert compiled.step().loss.item() == pytest.approx(plain.step().loss.item(), rel=1e-4)  # fp32, fused
    assert counters["stats"]["unique_graphs"] == graphs > 0


@pytest.mark.usefixtures("needs_compiler")
def test_warming_up_leaves_no_trace() -> None:
    """With dropout, which draws from a generator that a checkpoint saves."""
    compiled = warmed_up("model.dropout=0.2", "train.accumulate=2")
    fresh = trainer("model.dropout=0.2", "train.accumulate=2")
    for one, other in zip(compiled.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.grad is None
    state = fresh.state_dict()["trainer"]["dropout_rng"]
    assert torch.equal(compiled.state_dict()["trainer"]["dropout_rng"], state)
    assert compiled.step_number == 0
    assert compiled.process.examples_seen == 0


@pytest.mark.usefixtures("needs_compiler")
def test_evaluation_is_not_compiled() -> None:
    compiled = warmed_up()
    graphs = counters["stats"]["unique_graphs"]
    compiled.model.eval()
    for rows in (1, 2, 3):
        compiled.model.predict(torch.zeros(rows, 81, dtype=torch.long), torch.arange(5))
    assert counters["stats"]["unique_graphs"] == graphs
