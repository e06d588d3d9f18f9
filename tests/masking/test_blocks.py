"""Rows in blocks: what holds of every block, and of the loss as a whole."""

import math
from collections.abc import Callable
from itertools import combinations, product

import pytest
import torch

from tests.helpers import InBlocks, RandomStream, exact, random_stats, tabular, toy
from tests.helpers.likelihood import nelbo
from unmask.blocks import blocks_of, check_block_size, in_blocks, over_positions
from unmask.errors import UserError
from unmask.masking import weights
from unmask.masking.process import MaskingProcess, RowShard, masked_batch
from unmask.masking.puma import PumaPool
from unmask.masking.puma_variable import VariablePumaPool
from unmask.masking.uniform import RandomMasking
from unmask.types import CleanBatch

MASK, LENGTH, ROWS = 6, 12, 10
WHOLE = RowShard.whole(ROWS)
PROCESSES: dict[str, Callable[[int | None], MaskingProcess]] = {
    "uniform": lambda size: RandomMasking(mask_id=MASK, shard=WHOLE, seed=5, block_size=size),
    "puma": lambda size: PumaPool(mask_id=MASK, shard=WHOLE, seed=5, num_stages=4, threshold=0.8, block_size=size),
    "puma_random": lambda size: PumaPool(mask_id=MASK, shard=WHOLE, seed=5, confidence="random", block_size=size),
    "puma_variable": lambda size: VariablePumaPool(
        mask_id=MASK, shard=WHOLE, seed=5, tokens_per_step=2, eos_id=0, block_size=size
    ),
}
POOLS = [name for name in PROCESSES if name != "uniform"]


def test_the_view_and_its_keys() -> None:
    rows = torch.arange(12).view(2, 6)
    assert in_blocks(rows, 3).tolist() == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]]]
    assert over_positions(torch.tensor([[1, 2, 3], [4, 5, 6]]), 6).tolist() == [[1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6]]
    assert over_positions(torch.tensor([7, 8]), 3).tolist() == [[7, 7, 7], [8, 8, 8]]
    assert blocks_of(torch.tensor([0, 4]), 3).tolist() == [[0, 1, 2], [12, 13, 14]]


def test_a_size_that_does_not_divide() -> None:
    check_block_size(64, 256)
    with pytest.raises(UserError, match=r"process.block_size=48 does not divide rows of 256 positions; use 32 or 64"):
        check_block_size(48, 256)
    with pytest.raises(UserError, match=r"decode.block_size=100 .* use 27 or 81"):
        check_block_size(100, 81, "decode.block_size")
    with pytest.raises(UserError, match=r"process.block_size=5 does not divide rows of 12"):
        PROCESSES["puma"](5).next_batch(RandomStream(length=LENGTH, vocab_size=7))


@pytest.mark.parametrize("name", POOLS)
def test_what_is_done_stays_so_until_its_row_retires_with_all_blocks_done(name: str, stream: RandomStream) -> None:
    pool = PROCESSES[name](4)
    was_open, example = None, None
    frozen = retired = 0
    for step in range(15):
        batch = pool.next_batch(stream)
        is_open = (batch.xt == MASK).view(ROWS, 3, 4).any(dim=-1)
        assert torch.equal(is_open, (batch.scatter(batch.weight, 0.0) > 0).view(ROWS, 3, 4).any(dim=-1))
        if was_open is not None:
            is_new = pool.rows.example != example
            assert torch.equal(is_new, ~was_open.any(dim=1))  # it retires when all are done, and no sooner
            assert not (is_open & ~was_open)[~is_new].any()
            frozen += int((~was_open & was_open.any(dim=1, keepdim=True)).sum())
            retired += int(is_new.sum())
        pool.observe(batch, random_stats(batch, step))
        example, was_open = pool.rows.example, pool.rows.masked.any(dim=-1)
    assert frozen > 20
    assert retired > 20


def test_a_block_of_prompt_alone_is_done_from_the_start(stream: RandomStream) -> None:
    for name in POOLS:
        pool = PROCESSES[name](2)
        batch = pool.next_batch(stream)
        is_given = pool.rows.prompt_mask.view(ROWS, 6, 2).all(dim=-1)
        assert is_given.sum() > 5
        assert not (batch.xt == MASK).view(ROWS, 6, 2)[is_given].any()
        pool.observe(batch, random_stats(batch, 0))
        assert not pool.rows.masked[is_given].any()


@pytest.mark.parametrize("settings", [{}, {"threshold": 0.99}, {"factor": 0.01}])
def test_a_block_that_is_shorter_than_k_leaves(settings: dict, stream: RandomStream) -> None:
    """In every step it reveals at least one of its three positions."""
    pool = PumaPool(mask_id=MASK, shard=WHOLE, num_stages=41, block_size=3, **settings)
    for step in range(12):
        batch = pool.next_batch(stream)
        assert (pool.rows.visit < 3).all()
        pool.observe(batch, random_stats(batch, step))
    assert pool.examples_seen >= 4 * ROWS


def test_a_change_of_k_keeps_what_is_done(stream: RandomStream) -> None:
    changing, constant = (
        PumaPool(mask_id=MASK, shard=WHOLE, num_stages=3, stage_schedule=schedule, block_size=4)
        for schedule in ([(3, 9)], [])
    )
    for step in range(3):
        for pool in (changing, constant):
            batch = pool.next_batch(stream)
            pool.observe(batch, random_stats(batch, step))
    ours, theirs = changing.rows, constant.rows
    assert torch.equal(ours.is_masked, theirs.is_masked)
    is_live = ours.masked.any(dim=-1)
    assert is_live.any()
    assert (~is_live & is_live.any(dim=1, keepdim=True)).any()
    assert torch.equal(ours.stage[is_live], (9 * ours.num_revealed // ours.num_maskable.clamp(min=1))[is_live])


def block_nelbo(model: InBlocks, x0: torch.Tensor, maskable: list[int]) -> float:
    """Of one block, whose maskable positions these are, given the clean tokens before it (as in test_nelbo.py)."""
    size, length = model.block_size, len(maskable)
    total = 0.0
    for n in range(1, length + 1):
        for chosen in combinations(maskable, n):
            xt = x0.clone()
            xt[(chosen[0] // size + 1) * size :] = model.mask_id
            xt[list(chosen)] = model.mask_id
            log_probs = model.plain.logits(xt[None], torch.tensor(chosen)).log_softmax(-1)
            nll = -log_probs.gather(1, x0[list(chosen), None]).sum().item()
            total += nll / (length * math.comb(length - 1, n - 1))
    return total


def row_nelbo(model: InBlocks, x0: torch.Tensor, prompt_mask: torch.Tensor) -> float:
    """The sum over blocks."""
    size = model.block_size
    return sum(
        block_nelbo(model, x0, [i for i in range(start, start + size) if not prompt_mask[i]])
        for start in range(0, len(x0), size)
    )


def guesses(prompt_length: int, block_size: int) -> tuple[InBlocks, CleanBatch]:
    task = toy(values=3, length=6, prompt_length=prompt_length, sharpness=1.0)
    model = tabular(task)
    torch.nn.init.normal_(model.backbone.table, generator=torch.Generator().manual_seed(0))
    return InBlocks(model, block_size), task.validation(20)


@pytest.mark.parametrize(("prompt_length", "block_size"), [(0, 2), (1, 3), (4, 3), (2, 2)])
@torch.no_grad()
def test_the_expected_loss_is_the_nelbo_of_the_blocks(prompt_length: int, block_size: int) -> None:
    """Over all masks of a row: n uniform on {1, .., L_b} in each block, then any n of its positions. Exact."""
    model, examples = guesses(prompt_length, block_size)
    maskable = [
        [i for i in range(start, start + block_size) if i >= prompt_length] for start in range(0, 6, block_size)
    ]
    masks_of = [
        [(chosen, len(own) * math.comb(len(own), n)) for n in range(1, len(own) + 1) for chosen in combinations(own, n)]
        or [((), 1)]
        for own in maskable
    ]
    every = list(product(*masks_of))
    is_masked = torch.zeros(len(every), 6, dtype=torch.bool)
    for row, blocks in enumerate(every):
        is_masked[row, [i for chosen, _ in blocks for i in chosen]] = True
    probability = torch.tensor([1 / math.prod(ways for _, ways in blocks) for blocks in every], dtype=torch.float64)
    eligible = (torch.arange(6) >= prompt_length).expand_as(is_masked)
    weight = weights.per_masked(in_blocks(is_masked, 6 // block_size), in_blocks(eligible, 6 // block_size))
    for x0, prompt_mask in zip(examples.x0[:4], examples.prompt_mask, strict=False):
        rows = x0.expand(len(every), -1)
        batch = masked_batch(rows, torch.where(is_masked, model.mask_id, rows), model.mask_id, weight)
        loss = batch.scatter(model(batch).nll * batch.weight, 0.0).sum(dim=1)
        expected = row_nelbo(model, x0, prompt_mask) / (6 - prompt_length)
        assert (probability * loss).sum().item() == pytest.approx(expected, rel=1e-9)


@torch.no_grad()
def test_nelbo_and_training_loss_are_that_of_the_blocks_on_average() -> None:
    model, examples = guesses(1, 3)
    each = [row_nelbo(model, x0, given) for x0, given in zip(examples.x0, examples.prompt_mask, strict=True)]
    expected = sum(each) / (5 * len(each))

    class Same:
        epoch_size = 20

        def __getitem__(self, number: torch.Tensor) -> CleanBatch:
            return CleanBatch(x0=examples.x0[number % 20], prompt_mask=examples.prompt_mask[number % 20])

    losses = []
    for seed in range(15):
        batch = RandomMasking(mask_id=model.mask_id, shard=RowShard.whole(200), seed=seed, block_size=3).draw_batch(
            Same(), 0
        )
        losses.append((model(batch).nll * batch.weight).sum().item() / 200)
    for estimates in (losses, [nelbo(model, examples, draws=8, seed=seed).value for seed in range(15)]):
        values = torch.tensor(estimates, dtype=torch.float64)
        error = (values.std() / len(values) ** 0.5).item()
        assert error < 0.012 * expected  # so fine that another weight would show
        assert abs(values.mean().item() - expected) < 4 * error


def test_with_the_exact_posterior_the_nelbo_is_the_true_nll() -> None:
    task = toy(values=2, length=4)
    examples = task.validation(200)
    place = 2 ** torch.arange(3, -1, -1)
    true_nll = -task.probabilities[(examples.x0 * place).sum(1)].log().mean().item() / 4
    model = InBlocks(exact(task), 2)
    assert row_nelbo(model, examples.x0[0], examples.prompt_mask[0]) == pytest.approx(
        -task.probabilities[(examples.x0[0] * place).sum()].log().item(), rel=1e-6
    )
    estimate = nelbo(model, examples, draws=30)
    assert abs(estimate.value - true_nll) < 4 * estimate.stderr
    # One position a block: there is one mask, and the bound is the chain rule.
    assert nelbo(InBlocks(exact(task), 1), examples, draws=1).value == pytest.approx(true_nll, rel=1e-6)
