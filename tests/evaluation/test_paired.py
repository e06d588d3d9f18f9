"""Two evaluations beside each other, against counts made by hand; and `unmask eval RUN --against RUN2`."""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers import run_cli
from tests.helpers.runs import tiny_run
from unmask.evaluation.accuracy import Accuracy
from unmask.evaluation.evaluate import Evaluation
from unmask.evaluation.nelbo import Estimate, Likelihood, RowLikelihoods
from unmask.evaluation.paired import PairedComparison


def evaluation(grades: list[bool | None], nll: list[float]) -> Evaluation:
    known = [grade for grade in grades if grade is not None]
    accuracy = Accuracy({"accuracy": sum(known) / len(known)}, 1.0, len(known), [{"accuracy": own} for own in grades])
    rows = RowLikelihoods(torch.tensor(nll).double(), torch.tensor([1.0, 1.0, 1.0, 3.0, 2.0]).double())
    estimate = rows.over_corpus()
    return Evaluation(Likelihood(estimate, is_exact=False, rows=rows), {"prob/1": accuracy})


def test_examples_are_held_beside_each_other() -> None:
    """The third example was not graded for one of them, and counts for neither."""
    own = evaluation([True, True, None, True, False], [1.0, 2.0, 3.0, 4.0, 5.0])
    other = evaluation([True, False, True, False, True], [1.0, 2.0, 3.0, 5.0, 5.0])
    accuracy, nelbo = PairedComparison.of(own, other).measures
    assert (accuracy.measure, accuracy.value, accuracy.against) == ("prob/1", 0.75, 0.5)
    assert (accuracy.only, accuracy.only_against) == (2, 1)
    assert accuracy.p == 1.0  # 2 of 3 or further apart: all outcomes
    assert nelbo.measure == "NELBO"
    assert nelbo.difference.value == pytest.approx(-3 / 8)
    assert nelbo.difference.value == pytest.approx(nelbo.value - nelbo.against)
    backwards = PairedComparison.of(other, own).measures
    assert (backwards[0].only, backwards[0].only_against) == (1, 2)
    assert [each.difference.value for each in backwards] == [-accuracy.difference.value, -nelbo.difference.value]
    json.dumps(PairedComparison.of(own, other).as_dict(), allow_nan=False)


def test_of_one_example_there_is_no_interval() -> None:
    rows = RowLikelihoods(torch.ones(1).double(), torch.ones(1).double())
    single = Evaluation(Likelihood(Estimate(1.0, None), is_exact=True, rows=rows))
    (row,) = PairedComparison.of(single, single).table().rows
    assert list(row) == ["NLL", "1.0000", "1.0000", "+0.000", "", ""]


def test_a_run_against_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other, of_other_data = (tmp_path / name for name in ("one", "other", "of_other_data"))
    tiny_run(one).train()
    tiny_run(other, "train.seed=1", "process.name=uniform").train()
    tiny_run(of_other_data, "data.prompt_length=1").train()
    capsys.readouterr()
    arguments = ["eval", one, "--examples", "40", "--decoder", "prob"]
    assert run_cli(*arguments, "--against", other, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert run_cli("eval", other, "--examples", "40", "--decoder", "prob", "--json") == 0
    alone = json.loads(capsys.readouterr().out)
    measures = found["against"]["measures"]
    assert measures["prob/1"]["against"] == alone["accuracy"]["prob/1"]
    assert measures["prob/1"]["value"] == found["accuracy"]["prob/1"]
    assert measures["NELBO"]["against"] == pytest.approx(alone["nelbo"])
    low, high = measures["NELBO"]["difference"]["interval"]
    assert low <= found["nelbo"] - alone["nelbo"] <= high
    assert run_cli(*arguments, "--against", one) == 0
    printed = capsys.readouterr().out
    assert "on the same 40 examples" in printed
    lines = [[cell.strip() for cell in line.split("│")] for line in printed.splitlines()]
    (number,) = (number for number, cells in enumerate(lines) if "0 / 0" in cells)
    assert lines[number][4] == "+0.0"
    assert lines[number + 1][4] == "[+0.0, +0.0]"
    assert lines[number][2] == lines[number][3] != ""
    assert lines[number + 1][2] == lines[number + 1][3] != "[0.0, 0.0]"
    assert run_cli(*arguments, "--against", of_other_data) == 2
    assert "its examples are not those of" in capsys.readouterr().err
