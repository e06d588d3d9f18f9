"""The NELBO against brute force over all masks of a toy distribution."""

import math
from itertools import combinations, product

import pytest
import torch

from tests.helpers import exact, tabular, toy
from tests.helpers.likelihood import nelbo
from unmask.models.denoiser import Denoiser
from unmask.tasks.toy import Toy
from unmask.types import CleanBatch


def brute_force(model: Denoiser, examples: CleanBatch) -> float:
    """Proposition 2.1 of 2502.06768: over masks M and i in M, the sum of -log p(x_i | x[M]) / (L C(L-1, |M|-1)).

    (Divided by all rows' maskable tokens.)
    """
    total, num_tokens = 0.0, 0
    for x0, prompt_mask in zip(examples.x0, examples.prompt_mask, strict=True):
        maskable = (~prompt_mask).nonzero().flatten().tolist()
        length = len(maskable)
        for size in range(1, length + 1):
            for chosen in combinations(maskable, size):
                xt = x0.clone()
                xt[list(chosen)] = model.mask_id
                log_probs = model.logits(xt[None], torch.tensor(chosen)).log_softmax(-1)
                nll = -log_probs.gather(1, x0[list(chosen), None]).sum().item()
                total += nll / (length * math.comb(length - 1, size - 1))
        num_tokens += length
    return total / num_tokens


def assert_unbiased(model: Denoiser, examples: CleanBatch) -> None:
    """The mean over many seeds is brute force, within 4 standard errors of that mean: the masks' own noise alone."""
    estimates = torch.tensor([nelbo(model, examples, draws=16, seed=seed).value for seed in range(40)])
    error = (estimates.std() / len(estimates) ** 0.5).item()
    expected = brute_force(model, examples)
    assert error < 0.003 * expected  # so fine that another count or weight would show
    assert abs(estimates.mean().item() - expected) < 4 * error


def random_model(task: Toy, seed: int) -> Denoiser:
    model = tabular(task)
    torch.nn.init.normal_(model.backbone.table, generator=torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("prompt_length", [0, 1])
def test_nelbo_is_brute_force(prompt_length: int) -> None:
    task = toy(values=3, length=4, prompt_length=prompt_length)
    assert_unbiased(random_model(task, 0), task.validation(200))


def test_with_the_exact_posterior_it_is_the_true_nll() -> None:
    """Every order's chain rule gives log p(x), so the bound is tight for each example."""
    task = toy(values=3, length=3)
    examples = task.validation(500)
    place = 3 ** torch.arange(2, -1, -1)
    true_nll = -task.probabilities[(examples.x0 * place).sum(1)].log().mean().item() / 3
    assert brute_force(exact(task), examples) == pytest.approx(true_nll, rel=1e-6)
    estimate = nelbo(exact(task), examples, draws=60)
    assert abs(estimate.value - true_nll) < 4 * estimate.stderr


def test_the_same_masks_for_every_model() -> None:
    task = toy()
    first, second = (nelbo(exact(task), task.validation(64)).value for _ in range(2))
    assert first == second
    assert nelbo(exact(task), task.validation(64), batch_size=7).value == pytest.approx(first, rel=1e-12)


def test_the_standard_error_is_honest() -> None:
    """Over many corpora, the estimate spreads around the value of the distribution as the standard error says."""
    task = toy(values=3, length=4)
    model = random_model(task, 1)
    every = CleanBatch(x0=task.sequences, prompt_mask=torch.zeros_like(task.sequences, dtype=torch.bool))
    each = torch.tensor([brute_force(model, every[i : i + 1]) for i in range(len(every))], dtype=torch.float64)
    expected = (each * task.probabilities).sum().item()
    z = []
    for seed in range(120):
        generator = torch.Generator().manual_seed(seed)
        corpus = task.draw(torch.rand(100, generator=generator, dtype=torch.float64))
        estimate = nelbo(model, corpus, draws=4, seed=seed)
        z.append((estimate.value - expected) / estimate.stderr)
    assert 0.75 < torch.tensor(z).std().item() < 1.25  # 1 within 4 standard errors of a standard deviation of 120


def test_a_corpus_weighs_tokens_not_rows() -> None:
    """The sum of L_eff x row mean over the sum of L_eff; rows with less to predict are far easier here."""
    task = toy(values=2, length=4)
    model = random_model(task, 2)
    x0 = task.validation(200).x0
    prompt_mask = torch.arange(4) < torch.arange(200)[:, None] % 4
    is_masked = torch.tensor(list(product(range(3), repeat=4))) == model.mask_id
    model.backbone.table.data *= is_masked.sum(dim=1).view(-1, 1, 1) ** 2  # wild guesses where much is masked
    examples = CleanBatch(x0=x0, prompt_mask=prompt_mask)
    rows = torch.tensor([brute_force(model, examples[i : i + 1]) for i in range(200)])
    assert rows.mean() < 0.9 * brute_force(model, examples)  # or the test would not tell
    assert_unbiased(model, examples)
