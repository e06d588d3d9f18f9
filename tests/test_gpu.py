"""The same training on a CUDA device as on the CPU."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tests.helpers import lines
from unmask.config import recipes
from unmask.models.backends import BACKENDS
from unmask.models.visibility import EVERYTHING, AttentionPattern
from unmask.tasks.task import build_task
from unmask.training.trainer import Trainer

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
SMALL_TINYGSM = [
    "data={length: 24, vocab_size: 50, mask_id: 49, eos_id: 48, prompt_length: 6}",
    "model={preset: tinygsm-125m, dim: 32, ff_dim: 48, num_layers: 2, num_heads: 4}",
]


def make(device: str, *overrides: str) -> Trainer:
    config = recipes.load("debug", [f"train.device={device}", *overrides])
    task = build_task(config)
    return Trainer(config, task.tokens, task.train_stream(config.train.seed))


def test_pools_are_equal_and_losses_agree_in_fp64() -> None:
    cpu, cuda = make("cpu", "train.dtype=float64"), make("cuda", "train.dtype=float64")
    for _ in range(10):
        assert cuda.step().loss.item() == pytest.approx(cpu.step().loss.item(), rel=1e-9)
        assert torch.equal(cuda.process.rows.is_masked.cpu(), cpu.process.rows.is_masked)
        assert torch.equal(cuda.process.rows.example.cpu(), cpu.process.rows.example)


def test_bf16_trains_and_resumes() -> None:
    trainer, other = make("cuda", "train.dtype=bfloat16"), make("cuda", "train.dtype=bfloat16")
    for _ in range(5):
        loss = trainer.step().loss
    assert loss.isfinite()
    other.load_state_dict(trainer.state_dict())
    assert other.step_number == 5
    assert other.step().loss.isfinite()


def heads(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 4, 200, 64, dtype=dtype, device=CUDA, requires_grad=True) for _ in range(3)]


# bfloat16 has steps of 2^-8, and values here are about 1
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(
    "seen", [EVERYTHING, AttentionPattern(1), AttentionPattern(8), AttentionPattern(8, 104), AttentionPattern(40, 120)]
)
@pytest.mark.parametrize("backend", ["matmul", "flex"])
def test_attention_backends_agree(backend: str, seen: AttentionPattern, dtype: torch.dtype, tolerance: float) -> None:
    """One stream of 200 positions, or two: 104 and 96 in blocks of 8, 120 and 80 in blocks of 40."""
    torch._dynamo.reset()  # it compiles a function for eight patterns at most
    results = []
    for name in ("sdpa", backend):
        qkv = heads(dtype)
        run = torch.compile(BACKENDS[name]) if name == "flex" else BACKENDS[name]
        mixed = run(*qkv, 0.0, seen)
        results.append([mixed, *torch.autograd.grad(mixed.float().square().sum(), qkv)])
    for one, other in zip(*results, strict=True):
        assert (one - other).float().norm() <= tolerance * other.float().norm()


COMPILED = ["train.compile=true", "optim.name=muon"]


@pytest.mark.parametrize(
    ("process", "settings"),
    [
        *((process, ["train.compile=false"]) for process in ("uniform", "puma", "puma_variable", "ar")),
        ("uniform", COMPILED),
        ("puma", COMPILED),
        ("puma", ["train.compile=false", "process.start=uniform", "process.run=2"]),
    ],
)
def test_no_step_waits_for_all_that_the_device_was_asked(process: str, settings: list[str]) -> None:
    """A pool waits for its masks alone, which are there before the update (an event, of which PyTorch says nothing)."""
    config = recipes.load(f"tinygsm/{process}", ["train.batch_size=4", *settings, *SMALL_TINYGSM])
    task = build_task(config)
    trainer = Trainer(config, task.tokens, task.synthetic_stream(0))
    for _ in range(3):
        trainer.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for _ in range(8):
            trainer.step()
            assert trainer.process.examples_seen >= 0  # `train.max_examples` asks after every step
        torch.cuda.set_sync_debug_mode("default")
    # `set_sync_debug_mode` itself warns once, of "synchronizing operations" that it does not detect.
    waits = [str(warning.message) for warning in caught if "called a synchronizing" in str(warning.message)]
    assert not waits, waits


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "settings", [["train.parallel=ddp"], ["train.parallel=fsdp"], ["train.parallel=fsdp", "train.cpu_offload=true"]]
)
def test_two_gpus_train_as_one(settings: list[str], tmp_path: Path) -> None:
    out, steps = tmp_path / "two", ["train.steps=4", "eval.every=4", "log.every=1", "train.dtype=float64"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = ["unmask", "train", "debug", *steps, *settings, "--out", str(out)]
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = [row["train/loss"] for row in lines(out / "metrics.jsonl") if "train/loss" in row]
    one = make("cuda", "train.steps=4", "train.dtype=float64")
    assert losses == pytest.approx([one.step().loss.item() for _ in range(4)], rel=1e-8)
