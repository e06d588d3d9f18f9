"""NLL by mask, against the NELBO, plain Python and brute force."""

from itertools import combinations

import pytest
import torch

from tests.helpers import InBlocks, RandomStream, exact, tabular, toy
from tests.helpers.likelihood import nelbo
from tests.lab.diagnostics.untrained import untrained_run
from unmask.lab.diagnostics.likelihood import masked_nll, measure_nll
from unmask.lab.diagnostics.measures import NOWHERE, Bin, Bins, NotApplicable, distance_to_visible
from unmask.models.denoiser import Denoiser
from unmask.types import CleanBatch, MaskedBatch, TokenStats


@pytest.mark.parametrize("block_size", [None, 4])
def test_distances_are_those_of_a_search(block_size: int | None) -> None:
    is_masked = torch.rand(40, 12, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 1, 40)[:, None]
    is_masked[-1] = True
    left, right = distance_to_visible(is_masked, block_size)
    size = block_size or 12
    for r in range(40):
        for i in range(12):
            seen = [j for j in range(12) if (j // size == i // size and not is_masked[r, j]) or j // size < i // size]
            assert left[r, i] == min([i - j for j in seen if j <= i], default=NOWHERE)
            assert right[r, i] == min([j - i for j in seen if j >= i], default=NOWHERE)


class _Listener(Denoiser):
    """Says of every position a NLL that is a function of the canvas, and keeps what it was asked."""

    def __init__(self, block_size: int | None) -> None:
        super().__init__(torch.nn.Linear(1, 1), mask_id=6)
        self.size, self.batches = block_size, []

    @property
    def block_size(self) -> int | None:
        return self.size

    def forward(self, batch: MaskedBatch) -> TokenStats:
        self.batches.append(batch)
        nll = (batch.at % 7 + (batch.xt == 6).sum() % 5).double()
        return TokenStats(nll=nll, confidence=nll, top1=nll)


@pytest.mark.parametrize("block_size", [None, 3])
def test_bins_are_those_of_a_plain_loop(block_size: int | None) -> None:
    """Prompts of 0 to 5 tokens; every masked token weighs L_b / n_b."""
    examples = RandomStream(length=12, vocab_size=7)[torch.arange(20)]
    model = _Listener(block_size)
    found = masked_nll(model, examples, draws=3, batch_size=20)
    size = block_size or 12
    tokens = []  # rate, distance, distance on the left, weight, nll
    for batch in model.batches[:]:
        nll = batch.scatter(model(batch).nll, 0.0)
        for flat in batch.scored[batch.scored < 240].tolist():
            r, i = divmod(flat, 12)
            own = range(i // size * size, i // size * size + size)
            maskable = [j for j in own if not examples.prompt_mask[r, j]]
            hidden = [j for j in own if batch.xt[r, j] == 6]
            seen = [j for j in range(own[-1] + 1) if j < own[0] or j not in hidden]
            nearest = min([abs(i - j) for j in seen], default=NOWHERE)
            left = min([i - j for j in seen if j < i], default=NOWHERE)
            rate = len(hidden) / len(maskable)
            tokens.append((rate, nearest, left, 1 / rate, nll[r, i].item()))
    middle = [token for token in tokens if 0.4 < token[0] <= 0.6]
    for bins, of, where in (
        (found.rate, tokens, 0),
        (found.distance, tokens, 1),
        (found.left, tokens, 2),
        (found.distance_middle, middle, 1),
    ):
        assert sum(own.tokens for own in bins) == len(of)
        for own in bins:
            inside = [token for token in of if own.low < token[where] <= own.high]
            total = sum(token[3] for token in inside)
            assert own.tokens == len(inside)
            assert own.value == pytest.approx(sum(token[3] * token[4] for token in inside) / total)
            assert own.share == pytest.approx(total / sum(token[3] for token in of))
            assert own.at == pytest.approx(sum(token[3] * token[where] for token in inside) / total)


@pytest.mark.parametrize("block_size", [None, 2])
def test_the_bins_make_up_the_nelbo(block_size: int | None) -> None:
    task = toy(values=3, length=4, prompt_length=0 if block_size else 1)
    model = tabular(task)
    torch.nn.init.normal_(model.backbone.table, generator=torch.Generator().manual_seed(0))
    if block_size:
        model = InBlocks(model, block_size)
    examples = task.validation(50)
    found = masked_nll(model, examples, draws=3)
    expected = nelbo(model, examples, draws=3).value
    for bins in (found.rate, found.distance, found.left):
        assert sum(own.share * own.value for own in bins) == pytest.approx(expected, rel=1e-9)


def test_with_the_true_conditionals_it_is_the_conditional_entropy() -> None:
    """With n of 3 tokens hidden, the mean over the sets of that size of H(x_i | the others), by enumeration."""
    task = toy(values=3, length=3)
    found = masked_nll(exact(task), task.validation(300), draws=8)
    assert [own.at for own in found.rate] == pytest.approx([1 / 3, 2 / 3, 1])
    for n, own in enumerate(found.rate, start=1):
        terms = []
        for hidden in combinations(range(3), n):
            xt = task.sequences.clone()
            xt[:, list(hidden)] = task.tokens.mask_id
            for i in hidden:
                log_p = task.posterior(xt, torch.arange(len(xt)) * 3 + i)
                log_p = log_p.gather(1, task.sequences[:, i : i + 1]).squeeze(1)
                terms.append(-(task.probabilities * log_p).sum().item())
        assert abs(own.value - sum(terms) / len(terms)) < 4 * own.stderr < 0.2


def test_standard_errors_know_that_tokens_of_an_example_are_alike() -> None:
    """Each of 60 examples has an offset that its 1 to 8 tokens share; the truth is 0."""
    z = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        example = torch.arange(60).repeat_interleave(torch.randint(1, 9, (60,), generator=generator))
        value = torch.randn(60, generator=generator)[example] + 0.3 * torch.randn(len(example), generator=generator)
        bins = Bins([0.0, 1.0], 60)
        bins.add(example, torch.ones(len(example)), torch.ones(len(example)), value)
        (own,) = bins.means()
        z.append(own.value / own.stderr)
    assert 0.8 < torch.tensor(z).std().item() < 1.2  # 1 within 4 standard errors of a standard deviation of 200


def test_one_example_has_no_standard_error() -> None:
    bins = Bins([0.0, 1.0, 2.0], 2)
    bins.add(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 2]), torch.ones(3), torch.tensor([1.0, 2.0, 3.0]))
    first, _ = bins.means()
    assert isinstance(first, Bin)
    assert (first.value, first.tokens) == (1.5, 2)
    assert first.stderr != first.stderr


def test_unknown_answers_have_no_likelihood() -> None:
    run = untrained_run()
    unknown = CleanBatch(x0=torch.full((2, 81), run.task.tokens.mask_id), prompt_mask=torch.zeros(2, 81).bool())
    with pytest.raises(NotApplicable, match="not known as tokens"):
        measure_nll(run, unknown, draws=1, on_progress=lambda share: None)
