"""`benchmarks/decoding.py`: decoders of one run beside each other."""

import subprocess
import sys
from pathlib import Path

from tests.helpers import lines, run_cli

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "decoding.py"


def script(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_decoders_of_a_run_beside_each_other(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "decoders.jsonl"
    assert run_cli("train", "debug", "train.steps=2", "log.tensorboard=false", "--out", run) == 0
    decoders = ["prob,tokens_per_step=1", "prob,tokens_per_step=3"]
    script(run, "--out", out, "--examples", 4, "--rounds", 1, *decoders)
    one, three = lines(out)
    assert [one["decoder"], three["decoder"]] == decoders
    assert one["nfe"] > three["nfe"] >= one["nfe"] / 3
    assert one["n"] == three["n"] == 4
    table = script("--table", out)
    assert all(decoder in table for decoder in decoders)
