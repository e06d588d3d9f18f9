"""Seeds on a page: their mean where all of them have been, and each of them wherever it was evaluated."""

from pathlib import Path

import pytest

from tests.helpers.runs import write_run
from unmask.cli import compare
from unmask.lab.compare import Comparison
from unmask.lab.report.page import _measure
from unmask.lab.report.runs import RunsByMethod, read_run
from unmask.training.logging import MetricsFile

RATE = "eval/accuracy/ema/prob/3"


@pytest.fixture
def evaluated(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Makes a method of seeds that were evaluated at given steps: value = step / 100, seconds = 2 steps."""

    def make(*seeds: list[int]) -> RunsByMethod:
        runs = []
        for seed, steps in enumerate(seeds):
            folder = write_run(tmp_path / "puma" / f"seed_{seed}", f"train.seed={seed}")
            (folder / "metrics.jsonl").unlink()
            metrics = MetricsFile(folder / "metrics.jsonl", 0, {})
            for step in steps:
                metrics.write({"step": step, "seconds": 2.0 * step, "examples_seen": step, RATE: step / 100})
            metrics.close()
            runs.append(read_run(folder, pytest.fail))
        return {"puma": runs}

    return make


def test_the_mean_is_drawn_where_all_seeds_have_been(evaluated) -> None:  # type: ignore[no-untyped-def]
    (by_step, by_seconds, _) = (chart.lines[0] for chart in _measure(evaluated([10, 20, 30], [20, 25]), RATE).charts)
    assert by_step.points == [(20, 0.2), (25, 0.25)]
    assert by_seconds.points == [(40, 0.2), (50, 0.25)]
    assert by_step.seeds == [[(10, 0.1), (20, 0.2), (30, 0.3)], [(20, 0.2), (25, 0.25)]]


def test_seeds_of_one_evaluation_each_can_be_seen(evaluated) -> None:  # type: ignore[no-untyped-def]
    chart = _measure(evaluated([10], [12]), RATE).charts[0]
    assert chart.lines[0].points == []
    assert chart.svg().count('class="mark s0 reference"') == 2


def test_the_table_says_of_how_many_seeds(evaluated) -> None:  # type: ignore[no-untyped-def]
    curves = [own.curve(RATE) for own in evaluated([10, 20], [10, 20], [10, 22])["puma"]]
    comparison = Comparison({"puma": curves, "other": curves})
    assert compare._at(comparison, curves, 10.0) == "10.0% ± 0.0%"
    assert compare._at(comparison, curves, 20.0) == "20.0% ± 0.0%, 2 of 3"
    assert compare._at(comparison, curves, 22.0) == "22.0%, 1 of 3"
    assert compare._at(comparison, curves, 15.0) == ""
