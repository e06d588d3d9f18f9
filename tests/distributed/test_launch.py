"""Which process is which, and what cannot be: said before any work is done."""

import re

import pytest

from tests.helpers import SHORT, run_cli
from unmask.config.run import TrainConfig
from unmask.errors import UserError
from unmask.peers import Peers
from unmask.training.distributed import Launch, _is_group_error, device_of, read_launch, shard_of
from unmask.training.parallel import check_parallel

WHERE = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


class Pretended(Peers):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def test_without_a_launcher_there_is_one_process() -> None:
    assert read_launch({}) == read_launch({"MASTER_ADDR": "somewhere", "RANK": ""}) == Launch(0, 1, 0)
    assert read_launch({**WHERE, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == Launch(3, 4, 1)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0"}, "RANK=0 .* but WORLD_SIZE and LOCAL_RANK and MASTER_ADDR and MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0", **WHERE}, "WORLD_SIZE=2, LOCAL_RANK=0 .* but RANK is not set"),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **WHERE},
            "RANK=2, WORLD_SIZE=2.* from 0 to WORLD_SIZE - 1",
        ),
        ({"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **WHERE}, "RANK=one.* ranks are numbers"),
    ],
)
def test_a_half_set_environment_is_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_launch(environment)


@pytest.mark.parametrize(
    ("said", "is_lost"),
    [
        ("Application timeout caused pair closure", True),
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.1.1]:1234", True),
        ("NCCL communicator was aborted", True),
        ("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)", False),
    ],
)
def test_an_error_that_a_lost_process_causes_is_known_by_its_words(said: str, is_lost: bool) -> None:
    """The first two as gloo said them under torch 2.13; the first names no library."""
    assert _is_group_error(RuntimeError(said)) is is_lost


def test_rows_are_dealt_out_once_each() -> None:
    shards = [shard_of(Pretended(rank, 4), 24, 3) for rank in range(4)]
    assert [row for shard in shards for row in range(shard.start, shard.stop)] == list(range(24))


@pytest.mark.parametrize(("batch_size", "accumulate", "fix"), [(10, 1, 9), (12, 5, 15), (1, 1, 3)])
def test_a_batch_that_processes_do_not_divide_is_refused(batch_size: int, accumulate: int, fix: int) -> None:
    said = f"train.batch_size={batch_size} does not divide into 3 processes x train.accumulate={accumulate} .*={fix},"
    with pytest.raises(UserError, match=said):
        shard_of(Pretended(0, 3), batch_size, accumulate)


def test_a_device_of_ones_own_is_refused() -> None:
    with pytest.raises(UserError, match=re.escape("train.device=cuda:1: each of 2 processes has its own")):
        device_of(Pretended(0, 2), "cuda:1")
    assert device_of(Pretended(0, 2), "cpu") == "cpu"
    assert device_of(Pretended(0, 1), "cuda:1") == "cuda:1"


def test_an_offload_needs_shards() -> None:
    with pytest.raises(UserError, match=re.escape("set that, or train.cpu_offload=false")):
        check_parallel(TrainConfig(steps=1, cpu_offload=True), Pretended(0, 2))


@pytest.mark.parametrize(
    ("environment", "settings", "said"),
    [
        ({}, ["train.parallel=fsdp"], "there is one process; start several (torchrun"),
        ({"LOCAL_RANK": "0"}, [], "start with torchrun, which sets all five"),
    ],
)
def test_the_command_line_says_so(
    environment: dict[str, str],
    settings: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: object,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run_cli("train", "debug", *SHORT, *settings, "--out", f"{tmp_path}/run") == 2
    assert said in capsys.readouterr().err


def test_a_pool_that_is_not_there_cannot_be_restarted(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*SHORT, "process={name: uniform}", "--out", f"{tmp_path}/run"]
    assert run_cli("train", "debug", *settings) == 0
    assert run_cli("train", "debug", *settings, "train.steps=5", "--resume", "--restart-pool") == 2
    assert "--restart-pool: this run's process has no pool" in capsys.readouterr().err
