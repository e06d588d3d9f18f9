"""PUMA keeps the minimiser (2602.10314): on every mask that it visits, the optimum is the true conditional.

A tabular model is trained on a toy distribution. At the optimum of the loss, the expected gradient is zero exactly
where the table holds the true conditionals, so the test is that training ends there, and not elsewhere.
"""

import pytest
import torch

from tests.helpers import InBlocks, TabularBackbone, tabular, toy
from unmask.masking.process import RowShard
from unmask.masking.puma import PumaPool
from unmask.masking.uniform import RandomMasking


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"threshold": 0.6},
        {"confidence": "margin", "stage_schedule": [(100, 2)]},
        {"confidence": "random"},
        {"factor": 0.9, "block_size": 2},
        {"start": "uniform", "run": 2},
        {"start": "beta", "threshold": 0.6},
        {"run": 2},
    ],
)
def test_a_tabular_model_learns_the_true_conditionals_on_the_masks_it_visits(settings: dict) -> None:
    length = 4 if "block_size" in settings else 3
    task = toy(values=2, length=length, sharpness=1.0, seed=4)
    mask_id = task.tokens.mask_id
    size = settings.get("block_size", length)
    rows = 512 * size // length
    model = InBlocks(tabular(task), size)
    backbone: TabularBackbone = model.backbone
    puma = PumaPool(mask_id=mask_id, shard=RowShard.whole(rows), num_stages=3, **settings)
    model.confidence = puma.requirements.confidence
    stream = task.train_stream(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    visits = torch.zeros(len(backbone.table))
    average = torch.zeros_like(backbone.table)
    steps, burn_in = 600, 300
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 if step < burn_in else 0.01
        batch = puma.next_batch(stream)
        stats = model(batch)
        optimizer.zero_grad()
        ((stats.nll * batch.weight).sum() / rows).backward()
        optimizer.step()
        puma.observe(batch, stats)
        if step >= burn_in:
            seen = model.canvases(batch)[(batch.xt == mask_id).view(rows, -1, size).any(dim=-1)]
            visits += torch.bincount(backbone.code(seen), minlength=len(visits))
            average += backbone.table.detach() / (steps - burn_in)

    canvases = torch.cartesian_prod(*[torch.arange(mask_id + 1)] * length)
    often = canvases[(visits > 2000)[backbone.code(canvases)] & (canvases == mask_id).any(1)]
    assert len(often) >= 5
    block = torch.arange(length) // size
    own = block[(often == mask_id).long().argmax(dim=1)]  # that of the first masked position: what follows is not seen
    at = ((often == mask_id) & (block == own.unsqueeze(1))).flatten().nonzero().squeeze(1)
    learned = average[backbone.code(often)].flatten(0, 1)[at][:, :mask_id].softmax(-1)
    true = task.posterior(often, at)[:, :mask_id].exp()
    # 2000 draws know a probability to 1.1 %; Adam's noise, averaged over 300 steps, adds about as much.
    assert (learned - true).abs().max() < 0.04
    marginals = torch.stack([(task.sequences == value).double().T @ task.probabilities for value in range(mask_id)], 1)
    assert (true - marginals.repeat(len(often), 1)[at]).abs().max() > 0.08  # else learning the marginals would pass


def test_the_expected_uniform_loss_is_least_at_the_true_conditionals() -> None:
    task = toy(values=2, length=3, sharpness=1.5)
    stream = task.train_stream(0)
    from tests.helpers import exact

    masking = RandomMasking(mask_id=task.tokens.mask_id, shard=RowShard.whole(20_000))
    batch = masking.next_batch(stream)
    best = exact(task)
    loss = (best(batch).nll * batch.weight).sum() / 20_000
    for scale in (0.7, 1.3):
        other = exact(task)
        other.backbone.table.data *= scale
        assert (other(batch).nll * batch.weight).sum() / 20_000 > loss
