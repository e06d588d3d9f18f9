"""What `test_training.py` runs in each of two processes: trainings whose batches they share.

`python -m tests.distributed.train_cases FOLDER`, with what a launcher sets in the environment, trains every case,
saves, goes on, and does it again from what was saved: by two processes, and by one.
"""

import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.distributed import damaged_shards
from unmask.config import recipes
from unmask.config.registry import resolve
from unmask.peers import ALONE, Peers
from unmask.training import checkpoint, parallel
from unmask.training.distributed import joined, read_launch
from unmask.training.trainer import Trainer

WORLD, HALF, STEPS = 2, 2, 4
BASE = ["train.dtype=float64", "train.batch_size=4", "optim.grad_clip=null", "data.puzzles=64", "train.threads=1"]
FSDP = "train.parallel=fsdp"
SHARDS = "uniform, shards"
CAUSAL = ["model.causal=true", "model.alignment=next", "data.layout=two_grid"]
CASES = {
    "uniform": ["process={name: uniform}"],
    SHARDS: ["process={name: uniform}", FSDP, "train.accumulate=2", "optim.grad_clip=0.5"],
    "puma": ["process={name: puma, num_stages: 3, threshold: 0.2}", "train.accumulate=2"],
    "puma, shards": ["process={name: puma, num_stages: 3}", FSDP, "model.tied_head=true", "model.checkpointing=true"],
    "blocks": ["process={name: puma, num_stages: 3, block_size: 27}"],
    "blocks, shards": ["process={name: uniform, block_size: 27}", FSDP],
    "variable, shards": ["process={name: puma_variable, tokens_per_step: 5, threshold: 0.2}", FSDP],
    "self-conditioned": ["process={name: puma, num_stages: 3}", "model.self_conditioning=true", FSDP],
    "short runs": ["process={name: puma, num_stages: 6, start: uniform, run: 2, threshold: 0.2}"],
    "ar": ["process={name: ar}", *CAUSAL],
    "muon": ["process={name: uniform}", "optim.name=muon"],
    # Rows that two processes cannot share out evenly, and an odd number of matrices of a shape.
    "muon, shards": ["process={name: uniform}", FSDP, "optim.name=muon", "model.ff_dim=63", "model.num_layers=3"],
    "muon of heads, shards": ["process={name: uniform}", FSDP, "optim.name=muon", "optim.muon_heads=true"],
    "loops, shards": ["process={name: uniform}", FSDP, "model.loops={layers: [0, 1], times: [1, 3]}"],
    "dropout": ["process={name: puma, num_stages: 3, confidence: random}", "model.dropout=0.1", FSDP],
}


def make(case: str, peers: Peers = ALONE) -> Trainer:
    config = recipes.load("debug", [*BASE, *CASES[case]])
    task = resolve("task", config.task.name).from_config(config.data)
    return Trainer(config, task.tokens, task.train_stream(config.train.seed), peers)


def first_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """What the optimizer's first step will find, filled in by then."""
    found: dict[str, Tensor] = {}

    def remember(*_: object) -> None:
        for name, parameter in trainer.model.named_parameters():
            found.setdefault(name, parallel.gather_tensor(parameter.grad).clone())

    trainer.optimizer.members[0].register_step_pre_hook(remember)
    return found


def train(trainer: Trainer, steps: int) -> list[float]:
    return [trainer.step().loss.item() for _ in range(steps)]


def keep(trainer: Trainer, folder: Path, losses: list[float]) -> None:
    """The state, as a checkpoint; `Peers.metrics` too, which are of the global batch."""
    state = trainer.state_dict()
    extra = {"losses": losses, "metrics": trainer.process.metrics(), "examples": trainer.process.examples_seen}
    if trainer.peers.is_main or trainer.is_sharded:
        writers = trainer.peers if trainer.is_sharded else ALONE
        checkpoint.save(folder, trainer.step_number, state | {"extra": extra}, writers)
    trainer.peers.sum(torch.zeros(1))  # it is there


def kept(folder: Path, step: int, unread: Collection[str] = ()) -> dict[str, Any]:
    return checkpoint.load(folder / f"step_{step:08d}", unread=unread)


def train_in_halves(case: str, folder: Path, peers: Peers = ALONE) -> None:
    trainer = make(case, peers)
    gradients = first_gradients(trainer)
    for _ in range(STEPS // HALF):
        losses = train(trainer, HALF)
        keep(trainer, folder, losses)
    if peers.is_main:
        save_file(gradients, folder / "gradients.safetensors")


def train_second_half(case: str, source: Path, folder: Path, peers: Peers = ALONE) -> None:
    trainer = make(case, peers)
    trainer.load_state_dict(kept(source, HALF, Trainer.PER_PARAMETER if trainer.is_sharded else ()))
    keep(trainer, folder, [])
    keep(trainer, folder, train(trainer, STEPS - HALF))


def ask(folder: Path, peers: Peers) -> None:
    """Questions to a model of which each process has a share: together, and each at its own pace."""
    trainer = make("puma, shards", peers)
    trainer.model.eval()
    xt, at = canvases(trainer)
    with torch.no_grad():
        answers = {"together": trainer.model.predict(xt, at).confidence}
        with trainer.weights("ema"):
            for _ in range(1 + 2 * peers.rank):
                answers["alone"] = trainer.model.logits(xt, at)
        answers["again"] = trainer.model.predict(xt, at).confidence
    save_file(answers, folder / f"answers_{peers.rank}.safetensors")


def canvases(trainer: Trainer) -> tuple[Tensor, Tensor]:
    clean = trainer.stream[torch.arange(2)]
    xt = clean.masked(trainer.tokens.mask_id)
    return xt, (xt == trainer.tokens.mask_id).flatten().nonzero().squeeze(1)[:7]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with joined(read_launch(os.environ), timeout=60.0) as peers:
        for case in CASES:
            train_in_halves(case, folder / case / "two", peers)
            train_second_half(case, folder / case / "two", folder / case / "two_again", peers)
            train_second_half(case, folder / case / "one", folder / case / "two_from_one", peers)
        ask(folder, peers)
        damaged_shards.refuse_all(make(SHARDS, peers), folder / SHARDS / "two" / f"step_{HALF:08d}", folder / "damaged")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
