"""`metrics.jsonl` only grows, and every reader knows what counts in it."""

import json
from pathlib import Path

import pytest

from unmask.lab.report.curves import read_metrics
from unmask.training.logging import MetricsFile, lines_that_count


def row(step: int) -> dict:
    return {"step": step, "seconds": step / 2, "examples_seen": 8 * step}


def write(path: Path, steps: range, position: int = 0, resumed_at: int = 0) -> list[int]:
    """Writes a line for each step as a run does; returns where the file ended after each."""
    metrics = MetricsFile(path, position, row(resumed_at))
    ends = []
    for step in steps:
        metrics.write(row(step) | {"train/loss": 1.0 + step})
        ends.append(metrics.position)
    metrics.close()
    return ends


def read(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path.parent, pytest.fail)]


def test_what_a_lost_run_wrote_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    ends = write(path, range(1, 9))
    before = path.read_bytes()
    later = write(path, range(5, 8), ends[3], resumed_at=4)
    assert path.read_bytes().startswith(before)
    assert read(path) == [1, 2, 3, 4, 5, 6, 7]
    write(path, range(6, 10), later[0], resumed_at=5)
    assert read(path) == [*range(1, 10)]
    write(path, range(2, 4), ends[0], resumed_at=1)  # from before both
    assert read(path) == [1, 2, 3]
    assert all(json.loads(line).keys() >= row(0).keys() for line in path.read_text().splitlines())


def test_a_line_that_was_cut_short_by_a_kill_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    ends = write(path, range(1, 5))
    whole = path.read_bytes()
    for cut in range(ends[1] + 1, ends[2] + 1):
        path.write_bytes(whole[:cut])
        write(path, range(3, 6), ends[1], resumed_at=2)
        assert read(path) == [1, 2, 3, 4, 5]
        for line in path.read_bytes().splitlines()[3:]:
            json.loads(line)


def test_a_kill_while_the_resume_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    ends = write(path, range(1, 5))
    size = len(path.read_bytes())
    write(path, range(0), ends[1], resumed_at=2)
    noted = path.read_bytes()
    for cut in range(size, len(noted)):
        path.write_bytes(noted[:cut])
        write(path, range(3, 5), ends[1], resumed_at=2)
        assert read(path) == [1, 2, 3, 4]


def test_a_run_that_goes_on_where_it_ended_writes_nothing_more(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    ends = write(path, range(1, 5))
    before = path.read_bytes()
    write(path, range(0), ends[-1], resumed_at=4)
    assert path.read_bytes() == before


def test_lines_that_were_lost_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"b"')
    metrics = MetricsFile(path, 50, row(2))
    metrics.write({"b": 2})
    metrics.close()
    assert [line for _, line in lines_that_count(path.read_bytes())] == ['{"a": 1}', '{"b"', '{"b": 2}', ""]
    assert "lines are lost" in capsys.readouterr().err
