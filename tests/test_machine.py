"""Limits of the machine that this process runs on."""

import os
from pathlib import Path

import pytest
import torch

from unmask import machine
from unmask.cli import main
from unmask.data.prepare.settings import PrepareSettings
from unmask.errors import UserError


def limit(monkeypatch: pytest.MonkeyPatch, folder: Path, **files: str) -> None:
    for name, content in files.items():
        (folder / name.replace("_dot_", ".")).write_text(content)
    monkeypatch.setattr(machine, "_CGROUPS", folder)
    monkeypatch.setattr(machine, "_OWN_CGROUPS", folder / "own")
    monkeypatch.setattr(machine, "_MEMINFO", folder / "meminfo")


def test_cpus_are_those_of_the_affinity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit(monkeypatch, tmp_path)
    assert machine.cpus() == len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert machine.cpus() == 1


@pytest.mark.parametrize(("quota", "count"), [("max 100000", 8), ("250000 100000", 3), ("10000 100000", 1)])
def test_cpus_are_within_the_quota(quota: str, count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit(monkeypatch, tmp_path, cpu_dot_max=quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert machine.cpus() == count


def test_memory_is_the_lower_of_ram_and_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit(monkeypatch, tmp_path, memory_dot_max="max")
    ram = machine.memory()
    assert ram > 2**28
    limit(monkeypatch, tmp_path, memory_dot_max=str(2**28))
    assert machine.memory() == 2**28
    with pytest.raises(UserError, match=r"the model needs 47 GiB, this machine has 0\.25; take a smaller one"):
        machine.require_memory(47 * 2**30, "the model", "take a smaller one")
    machine.require_memory(2**28, "the model", "")


def test_limits_of_nested_cgroups_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit(monkeypatch, tmp_path, own="3:cpu,cpuacct:/batch\n2:memory:/batch/job\n0::/slice/job\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for folder, file, content in (
        ("slice", "memory.max", 2**30),
        ("slice/job", "memory.max", "max"),
        ("slice/job", "cpu.max", "500000 100000"),
        ("memory/batch/job", "memory.limit_in_bytes", 2**29),
        ("cpu/batch", "cpu.cfs_quota_us", 150_000),
        ("cpu/batch", "cpu.cfs_period_us", 100_000),
    ):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / file).write_text(str(content))
    assert (machine.cpus(), machine.memory()) == (2, 2**29)


def test_swap_counts_as_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit(monkeypatch, tmp_path, memory_dot_max=str(2**28), meminfo="MemTotal: 1 kB\nSwapTotal: 1024 kB\n")
    assert machine.memory() == 2**28 + 2**20
    (tmp_path / "memory.swap.max").write_text("4096")
    assert machine.memory() == 2**28 + 4096


@pytest.mark.parametrize("needed", [10**5000, 2**63, 1e300], ids=["digits", "word", "float"])
def test_no_number_is_too_large_to_be_refused(needed: float) -> None:
    with pytest.raises(UserError, match=r"the pool needs .* GiB"):
        machine.require_memory(needed, "the pool", "take a smaller one")


def test_threads_are_no_more_than_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(machine, "cpus", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    machine.use_threads()
    monkeypatch.delenv("OMP_NUM_THREADS")
    machine.use_threads()
    machine.use_threads(5)
    assert asked == [2, 5]


def test_a_command_takes_as_many_workers_as_it_has_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def prepare(settings: PrepareSettings) -> None:
        taken.append(settings.workers)
        raise UserError("enough")

    monkeypatch.setattr("unmask.data.prepare.run.prepare", prepare)
    for allowed in ({0}, {0, 1, 2}):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, allowed=allowed: allowed)
        assert main(["prepare", "tinygsm", "rows.jsonl", "--tokenizer", "bytes", "--out", "out"]) == 2
    assert taken[0] == 1
    assert taken[1] == machine.cpus()
