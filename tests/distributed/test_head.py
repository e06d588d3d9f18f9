"""Two processes with half of the rows each find the statistics and gradients of one that has all of them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed import head_cases
from tests.distributed.head_cases import CASES, ROWS, STEPS, WORLD, WRAPPERS, backward, batch, key, large_head, model
from tests.distributed.launching import launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes wrote what they found, with each wrapper in turn."""
    folder = tmp_path_factory.mktemp("found")
    commands = [[head_cases.__name__, str(folder), str(rank)] for rank in range(WORLD)]
    launched = launch(commands, folder / "logs")
    assert launched.wait() == [0] * WORLD, launched.said(0)[-5000:] + launched.said(1)[-5000:]
    return folder


@pytest.fixture(params=WRAPPERS)
def found(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Tensor]]:
    """What each process wrote."""
    return [load_file(folder / f"{request.param}_{rank}.safetensors") for rank in range(WORLD)]


# Sums in another order, in fp64: values are below 10, and rounding steps 1e-16 of that.
def assert_equal(ours: Tensor, expected: Tensor, what: str) -> None:
    assert ours.dtype == expected.dtype == torch.float64
    assert torch.allclose(ours, expected, rtol=0, atol=1e-12), what


@pytest.mark.parametrize(("tied", "parts"), CASES)
def test_two_processes_are_one(found: list[dict[str, Tensor]], tied: bool, parts: int) -> None:
    """Raw gradients, also where the head is tied and the embedding's sparse one is added to the head's.

    The processes score different numbers of positions: each one's own mean would not do.
    """
    single = model(tied)
    with large_head():
        stats = backward(single, batch(0, ROWS))
    for step in range(STEPS):
        for name, value in stats.items():
            both = torch.cat([one[key(tied, parts, step, name)] for one in found])
            assert_equal(both, value, name)
        for name, parameter in single.named_parameters():
            for one in found:
                assert_equal(one[key(tied, parts, step, name)], parameter.grad, name)


def test_the_processes_have_unequal_work() -> None:
    halves = [batch(0, ROWS // 2), batch(ROWS // 2, ROWS)]
    assert [len(half.scored) for half in halves] == [128, 256]
