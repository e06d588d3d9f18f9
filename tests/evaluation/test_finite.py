"""Numbers that are not finite or not known."""

import pytest
import torch
from torch import nn

from tests.helpers.likelihood import nelbo
from unmask.errors import NotFinite, UserError
from unmask.evaluation.accuracy import Accuracy
from unmask.evaluation.nelbo import Estimate, RowLikelihoods
from unmask.lab.diagnostics.likelihood import masked_nll
from unmask.models.denoiser import Denoiser
from unmask.types import CleanBatch


class Overflowing(nn.Module):
    """Gives nan for canvases that begin with the token 2."""

    def __init__(self) -> None:
        super().__init__()
        self.head_weight = nn.Parameter(torch.eye(4))

    def forward(self, xt: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        row = at // xt.shape[1]
        return torch.where((xt[row, 0] == 2).unsqueeze(1), torch.nan, torch.zeros(len(at), 4))


def test_an_evaluation_names_the_example() -> None:
    model = Denoiser(Overflowing(), mask_id=3)
    x0 = torch.tensor([[0, 1, 1], [1, 0, 1], [2, 1, 0]])
    examples = CleanBatch(x0=x0, prompt_mask=torch.arange(3).expand(3, 3) == 0)
    for measure in (nelbo, masked_nll):
        with pytest.raises(NotFinite, match="the model gives nan for example 2: its weights are not finite"):
            measure(model, examples, draws=2)
        measure(model, examples[:2], draws=2)


def test_one_example_has_no_standard_error() -> None:
    one = RowLikelihoods(torch.tensor([1.5, 0.0]).double(), torch.tensor([3.0, 0.0]).double()).over_corpus()
    assert one == Estimate(1.5, None)
    assert one.text(".2f") == "1.50"
    two = RowLikelihoods(torch.tensor([1.5, 0.5]).double(), torch.tensor([3.0, 3.0]).double()).over_corpus()
    assert two.stderr == pytest.approx(0.5)
    assert two.text(".2f") == "1.00 ± 0.50"
    assert Accuracy({"accuracy": 1.0}, nfe=3.0, n=1).stderr is None
    assert Accuracy({"accuracy": 0.5}, nfe=3.0, n=2).stderr == pytest.approx(8**-0.5)


def test_nothing_to_predict_is_said() -> None:
    with pytest.raises(UserError, match="there is nothing to predict"):
        RowLikelihoods(torch.zeros(2).double(), torch.zeros(2).double()).over_corpus()


def test_each_group_has_the_passes_of_its_own_examples() -> None:
    rows = [("9", True, 2), ("10", False, 6), ("9", False, 4), ("10", None, 90)]
    records = [{"group": group, "accuracy": is_right, "nfe": nfe} for group, is_right, nfe in rows]
    groups = Accuracy({"accuracy": 1 / 3}, nfe=25.5, n=3, records=records, not_graded=1).groups
    assert [(name, own.accuracy, own.nfe, own.n) for name, own in groups.items()] == [("9", 0.5, 3, 2), ("10", 0, 6, 1)]
