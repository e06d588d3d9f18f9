"""The noise scale, where mean and covariance of the gradients are known."""

import pytest
import torch

from tests.lab.diagnostics.untrained import toy_settings, untrained_run
from unmask.evaluation.nelbo import Estimate
from unmask.lab.diagnostics.diagnose import Diagnosis, as_json
from unmask.lab.diagnostics.likelihood import MaskedNll
from unmask.lab.diagnostics.measures import NOWHERE, Bin
from unmask.lab.diagnostics.noise_scale import (
    BinNoise,
    Moments,
    NoiseScale,
    _canvases,
    gradient,
    measure_noise_scale,
)


def moments(seed: int, n: int, mean: torch.Tensor, deviation: torch.Tensor) -> Moments:
    """Of gradients of `|w - x|^2 / 2` in w, x drawn around 0: their mean is w, their covariance that of x."""
    found = Moments()
    for x in torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed)):
        found.add(mean - deviation * x)
    return found


def test_it_is_the_sample_variance() -> None:
    g = torch.randn(21, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    found = Moments()
    for each in g:
        found.add(each)
    signal, variance, scale = (each.value for each in found.estimates())
    assert variance == pytest.approx(g.var(dim=0).sum().item())
    assert signal == pytest.approx(g.mean(dim=0).square().sum().item() - variance / 21)
    assert scale == pytest.approx(variance / signal)


def test_of_a_quadratic_it_is_unbiased_with_an_honest_standard_error() -> None:
    w, deviation = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 1.0, 3.0])
    truth = (w.square().sum().item(), deviation.square().sum().item())
    runs = [moments(seed, 64, w, deviation).estimates() for seed in range(200)]
    for part in (0, 1):
        values = torch.tensor([run[part].value for run in runs])
        assert abs(values.mean().item() - truth[part]) < 4 * values.std().item() / 200**0.5
        claimed = torch.tensor([run[part].stderr for run in runs]).square().mean().sqrt()
        assert 0.75 < (claimed / values.std()).item() < 1.35  # the jackknife over 8 groups leans to the large side


def test_without_a_signal_the_scale_has_a_lower_bound_alone() -> None:
    """The mean gradient is 0: |G|^2 is 0 within its error."""
    found = BinNoise(0.0, 1.0, 64, *moments(0, 64, torch.zeros(4), torch.ones(4)).estimates())
    assert not found.is_measured
    assert found.least > 16  # 4 / |G|^2 with |G|^2 < 0.25: that of a mean of 64 is 4 / 64 on average
    assert BinNoise(0.0, 1.0, 64, *moments(0, 64, torch.ones(4), torch.ones(4)).estimates()).is_measured


def test_json_keeps_large_numbers_and_leaves_open_edges_out() -> None:
    of_noise = BinNoise(0.0, 1.0, 64, Estimate(1e-9, 0.1), Estimate(30.0, 0.1), Estimate(3e10, 0.1))
    nothing_visible = Bin(NOWHERE - 1.0, float(NOWHERE), float(NOWHERE), 4e9, 0.1, 0.5, 7)
    nll = MaskedNll([], [nothing_visible], [], [])
    found = as_json(Diagnosis(4, "ema", nll=nll, noise=NoiseScale("raw", [of_noise])))
    assert found["noise"]["bins"][0]["scale"]["value"] == 3e10
    (edge,) = found["nll"]["distance"]
    assert (edge["low"], edge["high"], edge["value"], edge["tokens"]) == (None, None, 4e9, 7)


@pytest.mark.parametrize("size", [None, 2])
def test_gradients_of_canvases_add_up_to_that_of_the_batch(size: int | None) -> None:
    process = f"process={{name: uniform, block_size: {size or 'null'}}}"
    run = untrained_run(*toy_settings(process, "train.batch_size=4", "train.dtype=float64"))
    batch = run.trainer().process.next_batch(run.trainer().stream)
    units = list(_canvases(batch, run.trainer().stream[torch.arange(4)], run.trainer().model))
    assert len(units) == 4 * 6 // (size or 6)
    total = sum(gradient(run.trainer().model, unit) for _, _, unit in units)
    assert torch.allclose(total, gradient(run.trainer().model, batch), atol=1e-12)
    for _, number, unit in units:
        assert number / 5 < int((unit.weight > 0).sum()) / (size or 6) <= (number + 1) / 5


def test_each_share_has_its_gradients() -> None:
    run = untrained_run(*toy_settings("process={name: uniform}", "train.batch_size=8", length=5))
    found = measure_noise_scale(run, per_bin=4, on_progress=lambda share: None)
    assert [(own.low, own.high) for own in found.bins] == [(k / 5, (k + 1) / 5) for k in range(5)]
    assert all(2 <= own.canvases <= 4 and own.variance.value > 0 for own in found.bins)
