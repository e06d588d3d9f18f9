"""Several processes, each told who it is as a launcher would."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 300  # a few are enough, more on a busy machine; what hangs is ended


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@dataclass
class Launched:
    """Processes that write what they say to files."""

    processes: list[subprocess.Popen]
    logs: list[Path]

    def said(self, rank: int) -> str:
        return self.logs[rank].read_text()

    def wait(self, seconds: float = SECONDS) -> list[int]:
        """Their exit codes. What has not ended by then is killed, which shows in its code."""
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline and any(process.poll() is None for process in self.processes):
                time.sleep(0.05)
        finally:
            self.end()
        return [process.returncode for process in self.processes]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def launch(commands: list[list[str]], folder: Path) -> Launched:
    """Starts `python -m` with each of the commands, one for each rank."""
    folder.mkdir(parents=True, exist_ok=True)
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    logs = [folder / f"{rank}.log" for rank in range(len(commands))]
    processes = []
    for rank, (command, log) in enumerate(zip(commands, logs, strict=True)):
        who = {"RANK": str(rank), "WORLD_SIZE": str(len(commands)), "LOCAL_RANK": str(rank)}
        with log.open("w") as file:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", *command],
                    cwd=ROOT,
                    env={**os.environ, **where, **who},
                    stdout=file,
                    stderr=file,
                )
            )
    return Launched(processes, logs)
