"""The likelihood of a corpus in one number."""

from typing import Any

from unmask.evaluation.nelbo import Estimate, row_nelbos, row_nlls
from unmask.models.denoiser import Denoiser
from unmask.types import CleanBatch


def nelbo(model: Denoiser, examples: CleanBatch, **options: Any) -> Estimate:
    """Estimates the NELBO; options as in `row_nelbos`."""
    return row_nelbos(model, examples, **options).over_corpus()


def nll(model: Denoiser, examples: CleanBatch, **options: Any) -> Estimate:
    """Computes the NLL under a causal model; options as in `row_nlls`."""
    return row_nlls(model, examples, **options).over_corpus()
