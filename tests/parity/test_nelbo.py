"""The NELBO against brute force over all masks of a toy distribution."""

import math
from itertools import combinations

import pytest
import torch

from tests.helpers import exact, tabular, toy
from unmask.evaluation.nelbo import nelbo
from unmask.models.denoiser import Denoiser
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
                log_probs = model.predict(xt[None], torch.tensor(chosen)).log_softmax(-1)
                nll = -log_probs.gather(1, x0[list(chosen), None]).sum().item()
                total += nll / (length * math.comb(length - 1, size - 1))
        num_tokens += length
    return total / num_tokens


@pytest.mark.parametrize("prompt_length", [0, 1])
def test_nelbo_is_brute_force_within_its_standard_error(prompt_length: int) -> None:
    task = toy(values=3, length=4, prompt_length=prompt_length)
    examples = task.validation(200)
    model = tabular(task)
    torch.nn.init.normal_(model.backbone.table, generator=torch.Generator().manual_seed(0))
    expected = brute_force(model, examples)
    estimate = nelbo(model, examples, draws=40)
    assert abs(estimate.value - expected) < 4 * estimate.stderr
    assert estimate.stderr < 0.05


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
    """Over many seeds, the spread of the estimate is what the standard error says (stratification only lowers it)."""
    task = toy(values=3, length=4)
    model = tabular(task)
    torch.nn.init.normal_(model.backbone.table, generator=torch.Generator().manual_seed(1))
    examples = task.validation(100)
    expected = brute_force(model, examples)
    estimates = [nelbo(model, examples, draws=4, seed=seed) for seed in range(60)]
    z = torch.tensor([(estimate.value - expected) / estimate.stderr for estimate in estimates])
    assert z.abs().max() < 4
    assert 0.05 < z.std() < 1.3


def test_a_corpus_weighs_tokens_not_rows() -> None:
    """Rows with different numbers of maskable tokens: the sum of L_eff x row mean over the sum of L_eff."""
    task = toy(values=2, length=4)
    model = tabular(task)
    torch.nn.init.normal_(model.backbone.table, generator=torch.Generator().manual_seed(2))
    x0 = task.validation(300).x0
    prompt_mask = torch.arange(4) < torch.arange(300)[:, None] % 4
    examples = CleanBatch(x0=x0, prompt_mask=prompt_mask)
    estimate = nelbo(model, examples, draws=40)
    assert abs(estimate.value - brute_force(model, examples)) < 4 * estimate.stderr
