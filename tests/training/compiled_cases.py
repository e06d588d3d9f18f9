"""What `test_compiled.py` runs in a process without shape checks: they cannot be compiled."""

import pytest
import torch
from torch._dynamo.utils import counters

from tests.helpers import SHORT
from unmask.config import recipes
from unmask.config.registry import resolve
from unmask.decoding.decoder import Decoder
from unmask.models import denoiser, head, precision
from unmask.training.trainer import Trainer

CPU = torch.device("cpu")


def trainer(*settings: str) -> Trainer:
    config = recipes.load("debug", [*SHORT, "model.num_layers=1", *settings])
    task = resolve("task", config.task.name).from_config(config.data)
    return Trainer(config, task.tokens, task.synthetic_stream(0))


@pytest.fixture
def needs_compiler() -> None:
    if not precision.should_compile("auto", CPU):
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
@pytest.mark.parametrize("tied", [True, False])
def test_so_are_those_of_a_large_vocabulary(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its head is compiled too, for any number of positions; with activation checkpointing as well."""
    monkeypatch.setattr(denoiser, "LARGE_VOCABULARY", 8)
    monkeypatch.setattr(head, "CHUNK", 4)
    monkeypatch.setattr(head.token_stats, "__kwdefaults__", {**head.token_stats.__kwdefaults__, "chunk": 4})
    settings = [f"model.tied_head={str(tied).lower()}", "model.checkpointing=true"]
    plain, compiled = trainer(*settings), warmed_up(*settings)
    for _ in range(2):  # the last chunk's size, and another number of positions
        assert compiled.step().loss.item() == pytest.approx(plain.step().loss.item(), rel=1e-4)
    graphs = counters["stats"]["unique_graphs"]
    for _ in range(6):
        assert compiled.step().loss.item() == pytest.approx(plain.step().loss.item(), rel=1e-4)
    assert counters["stats"]["unique_graphs"] == graphs > 0


@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.parametrize("vocabulary", [8, 8192])
def test_compiled_decoding_is_the_plain_one_and_compiles_once(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoiser, "LARGE_VOCABULARY", vocabulary)
    torch._dynamo.reset()
    model = trainer().model.eval()
    canvases = torch.randint(11, (5, 81), generator=torch.Generator().manual_seed(0))
    plain = Decoder(model.predict, 10).decode(canvases)
    model.compile_decoding()
    Decoder(model.predict, 10).decode(canvases[:3])
    graphs = counters["stats"]["unique_graphs"]
    compiled = Decoder(model.predict, 10).decode(canvases)
    assert torch.equal(plain.tokens, compiled.tokens)
    assert torch.equal(plain.nfe, compiled.nfe)
    assert counters["stats"]["unique_graphs"] == graphs > 0


@pytest.mark.usefixtures("needs_compiler")
def test_so_are_those_of_a_self_conditioned_model() -> None:
    """Whether a step has a first pass or not: both are compiled by then."""
    plain, compiled = trainer("model.self_conditioning=true"), warmed_up("model.self_conditioning=true")
    graphs = counters["stats"]["unique_graphs"]
    for _ in range(6):
        assert compiled.step().loss.item() == pytest.approx(plain.step().loss.item(), rel=1e-4)
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
