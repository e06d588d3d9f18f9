"""Limits of the machine that this process runs on."""

import os
from pathlib import Path

import pytest

from unmask import machine
from unmask.errors import UserError


def limit(monkeypatch: pytest.MonkeyPatch, folder: Path, **files: str) -> None:
    for name, content in files.items():
        (folder / name.replace("_dot_", ".")).write_text(content)
    monkeypatch.setattr(machine, "_CGROUP", folder)


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
