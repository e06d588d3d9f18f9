"""Examples a second of 1 and of N gloo processes on this machine, one thread each, and what their votes cost.

`python benchmarks/processes.py [RECIPE] [key=value ...]` prints one JSON object for each. Every process needs a core of
its own, or the numbers say nothing: run it when the machine is quiet.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time

import torch

from unmask.config import recipes
from unmask.peers import Peers
from unmask.tasks.task import build_task
from unmask.training.distributed import joined, read_launch
from unmask.training.trainer import Trainer

STEPS, WARM_UP, VOTES = 20, 5, 500
CASES = [(1, "ddp"), (2, "ddp"), (2, "fsdp")]


def measure(peers: Peers, recipe: str, settings: list[str]) -> dict[str, object]:
    config = recipes.load(recipe, [*settings, "train.threads=1"])
    torch.set_num_threads(1)
    task = build_task(config)
    trainer = Trainer(config, task.tokens, task.synthetic_stream(config.train.seed), peers)
    trainer.choose_attention()
    seconds = []
    for _ in range(WARM_UP + STEPS):
        started = time.perf_counter()
        trainer.step()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[WARM_UP:])
    return {
        "processes": peers.size,
        "parallel": config.train.parallel,
        "seconds_per_step": median,
        "examples_per_second": config.train.batch_size / median,
        "vote_share": vote_seconds(peers) / median,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "dtype": trainer.model.compute_dtype,
        "compiled": trainer.is_compiled,
    }


def vote_seconds(peers: Peers) -> float:
    """Of one vote that is waited for at once; a run hides it behind a step."""
    started = time.perf_counter()
    for _ in range(VOTES):
        peers.async_all_reduce(lambda: [0.0, 0.0])()
    return (time.perf_counter() - started) / VOTES


def launch(size: int, arguments: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    who = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    command = [sys.executable, __file__, *arguments]
    started = [subprocess.Popen(command, env={**os.environ, **where, **own}) for own in who]
    codes = [process.wait() for process in started]
    if any(codes):
        sys.exit("a process failed")


def main(arguments: list[str]) -> None:
    recipe, settings = (arguments or ["sudoku/paper_puma"])[0], arguments[1:]
    if "RANK" not in os.environ:
        for size, parallel in CASES:
            launch(size, [recipe, *settings, f"train.parallel={parallel}"])
        return
    with joined(read_launch(os.environ), timeout=600.0) as peers:
        result = measure(peers, recipe, settings)
        if peers.is_main:
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
