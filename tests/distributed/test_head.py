"""Two processes with half of the rows each find the statistics and gradients of one that has all of them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed import head_cases
from tests.distributed.head_cases import CASES, ROWS, STEPS, WORLD, WRAPPERS, backward, batch, key, large_head, model

ROOT = Path(__file__).parents[2]
SECONDS = 60  # a few are enough; what hangs is ended


@pytest.fixture(scope="module", params=WRAPPERS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What each process wrote."""
    folder = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-m", head_cases.__name__, request.param, str(folder)]
    logs = [folder / f"{rank}.log" for rank in range(WORLD)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as file:
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                processes.append(
                    subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment, stdout=file, stderr=file)
                )
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(0.05)
        said = "\n".join(log.read_text()[-5000:] for log in logs)
        assert [process.returncode for process in processes] == [0] * WORLD, said
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [load_file(folder / f"{rank}.safetensors") for rank in range(WORLD)]


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
