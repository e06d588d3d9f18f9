"""The same training on a CUDA device as on the CPU."""

import pytest
import torch

from unmask import recipes
from unmask.registry import resolve
from unmask.training.trainer import Trainer

pytestmark = pytest.mark.gpu


def make(device: str, *overrides: str) -> Trainer:
    config = recipes.load("debug", [f"train.device={device}", *overrides])
    task = resolve("task", config.task.name).from_config(config.data)
    return Trainer(config, task.tokens, task.train_stream(config.train.seed))


def test_pools_are_equal_and_losses_agree_in_fp64() -> None:
    cpu, cuda = make("cpu", "train.dtype=float64"), make("cuda", "train.dtype=float64")
    for _ in range(10):
        assert cuda.step().loss.item() == pytest.approx(cpu.step().loss.item(), rel=1e-9)
        assert torch.equal(cuda.process.pool.is_masked.cpu(), cpu.process.pool.is_masked)
        assert torch.equal(cuda.process.pool.example.cpu(), cpu.process.pool.example)


def test_bf16_trains_and_resumes() -> None:
    trainer, other = make("cuda", "train.dtype=bfloat16"), make("cuda", "train.dtype=bfloat16")
    for _ in range(5):
        loss = trainer.step().loss
    assert loss.isfinite()
    other.load_state_dict(trainer.state_dict())
    assert other.step_number == 5
    assert other.step().loss.isfinite()
