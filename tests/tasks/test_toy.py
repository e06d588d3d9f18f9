import torch

from tests.helpers import all_canvases, chi_square, toy


def test_posterior_is_bayes() -> None:
    task = toy(values=2, length=3)
    for xt in all_canvases(task):
        for position in (xt == 2).nonzero().flatten().tolist():
            expected = torch.zeros(2, dtype=torch.float64)
            for sequence, p in zip(task.sequences, task.probabilities, strict=True):
                if all(seen in (2, value) for seen, value in zip(xt.tolist(), sequence.tolist(), strict=True)):
                    expected[sequence[position]] += p
            got = task.posterior(xt[None], torch.tensor([position]))[0].exp()
            assert torch.allclose(got, torch.cat([expected / expected.sum(), torch.zeros(1, dtype=torch.float64)]))


def test_the_stream_draws_from_the_joint() -> None:
    task = toy(values=3, length=2)
    x0 = task.train_stream(0)[torch.arange(20_000)].x0
    counts = torch.bincount(x0[:, 0] * 3 + x0[:, 1], minlength=9).double()
    assert abs(chi_square(counts, task.probabilities * 20_000)) < 5
