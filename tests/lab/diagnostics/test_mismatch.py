"""The distance of masks: brute force, equal distributions, and processes whose masks are known."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.helpers import exact, toy
from tests.lab.diagnostics.untrained import toy_settings, untrained_run
from unmask.decoding.config import DecodeConfig
from unmask.lab.diagnostics.measures import WIDTH, MaskSet, mmd2
from unmask.lab.diagnostics.mismatch import Mismatch, group_by_canvas, measure_mismatch
from unmask.lab.diagnostics.simulation import simulate_masking


def masks(seed: int, p: Tensor, copies: int = 4) -> MaskSet:
    """Independent masks, position i hidden with probability p[i], two of each copy."""
    u = torch.rand(2 * copies, len(p), generator=torch.Generator().manual_seed(seed))
    return MaskSet(u < p, torch.arange(2 * copies) // 2)


def brute_force(x: MaskSet, y: MaskSet, num_maskable: int) -> float:
    def k(a: Tensor, b: Tensor) -> float:
        return math.exp(-sum(int(i != j) for i, j in zip(a, b, strict=True)) / (WIDTH * num_maskable))

    def mean(first: MaskSet, second: MaskSet, *, is_same: bool) -> float:
        pairs = [
            k(a, b)
            for a, c in zip(first.is_masked, first.copy, strict=True)
            for b, d in zip(second.is_masked, second.copy, strict=True)
            if not (is_same and c == d)
        ]
        return sum(pairs) / len(pairs)

    return mean(x, x, is_same=True) + mean(y, y, is_same=True) - 2 * mean(x, y, is_same=False)


def test_mmd_is_brute_force() -> None:
    x, y = masks(0, torch.full((6,), 0.5)), masks(1, torch.linspace(0.1, 0.9, 6), copies=3)
    assert mmd2(x, y, 5) == pytest.approx(brute_force(x, y, 5))


def test_of_one_distribution_it_is_0_on_average_and_of_two_it_is_not() -> None:
    p, q = torch.linspace(0.2, 0.8, 6), torch.linspace(0.8, 0.2, 6)
    same = torch.tensor([mmd2(masks(seed, p), masks(1000 + seed, p), 6) for seed in range(100)])
    assert abs(same.mean()) < 4 * same.std() / 10
    other = torch.tensor([mmd2(masks(seed, p), masks(1000 + seed, q), 6) for seed in range(100)])
    assert other.mean() > 10 * other.std() / 10


def test_trajectories_that_are_certain_are_no_distance_from_themselves() -> None:
    """Two copies of one decoding: what the unbiased estimate makes of draws is exact here."""
    trajectory = torch.ones(4, 5).tril().bool()
    copies = MaskSet(trajectory.repeat(2, 1), torch.tensor([0] * 4 + [1] * 4))
    assert mmd2(copies, copies, 5) == pytest.approx(0, abs=1e-12)


def test_masks_are_sorted_by_block_of_an_example() -> None:
    """Row 3 is copy 1 of example 1 of two; its second block is visible, so no mask."""
    is_masked = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]]).bool()
    found = group_by_canvas([(torch.tensor([0, 3]), is_masked)], num_examples=2, block_size=2)
    assert {key: (own.is_masked.tolist(), own.copy.tolist()) for key, own in found.items()} == {
        0: ([[True, False]], [0]),
        1: ([[True, True]], [0]),
        2: ([[False, True]], [1]),
    }


def measured(process: str, decoder: DecodeConfig, *, length: int = 6) -> Mismatch:
    settings = toy_settings(f"process={process}", values=2, length=length, sharpness=3.0)
    run = untrained_run(*settings, model=exact(toy(values=2, length=length, sharpness=3.0)))
    return measure_mismatch(run, run.task.validation(6), decoder, on_progress=lambda share: None)


def test_the_vanilla_sampler_meets_uniform_masks() -> None:
    """In random order, one at a time, every set of each size is equally likely: no distance beyond chance."""
    found = measured("{name: uniform}", DecodeConfig(confidence="random", tokens_per_step=1))
    for side in (found.trained, found.uniform):
        assert abs(side.matched.value) < 4 * side.matched.stderr
        assert abs(side.whole.value) < 4 * side.whole.stderr


def test_pumas_masks_are_those_of_its_decoder() -> None:
    """With the true conditionals: nearer than uniform ones; no distance where both draw their order at random."""
    most_confident = DecodeConfig(confidence="prob", tokens_per_step=1)
    found = measured("{name: puma, num_stages: 6}", most_confident)
    assert found.trained.matched.value < 0.6 * found.uniform.matched.value
    assert found.trained.differing.value < 0.6 * found.uniform.differing.value
    assert found.uniform.matched.value > 10 * found.uniform.matched.stderr
    chance = DecodeConfig(confidence="random", tokens_per_step=1)
    by_chance = measured("{name: puma, num_stages: 5, confidence: random}", chance, length=5)  # one size in each bin
    assert abs(by_chance.trained.matched.value) < 4 * by_chance.trained.matched.stderr


PROCESSES = [
    "{name: uniform}",
    "{name: puma, num_stages: 3}",
    "{name: puma, num_stages: 3, block_size: 3}",
]


@pytest.mark.parametrize("process", PROCESSES)
def test_a_rehearsal_shows_its_examples_and_leaves_the_run_alone(process: str) -> None:
    run = untrained_run(
        *toy_settings(f"process={process}", "train.batch_size=8", "eval.examples=3", values=2, length=6)
    )
    for _ in range(2):
        run.trainer().step()
    before = str(run.trainer().process.state_dict())
    examples = run.task.validation(3)
    shown = simulate_masking(run, examples, copies=2, least=4, on_progress=lambda share: None)
    assert str(run.trainer().process.state_dict()) == before
    assert len(shown) >= 4
    for batch in shown:
        assert torch.equal(batch.x0, examples.x0.repeat(2, 1))
        is_masked = batch.xt == run.task.tokens.mask_id
        assert not (is_masked & examples.prompt_mask.repeat(2, 1)).any()
        assert not torch.equal(is_masked[:3], is_masked[3:])  # copies have noise of their own


def test_a_rehearsed_pool_has_forgotten_its_start() -> None:
    """A pool starts with rows at all stages, revealed at random; what is shown was entered at stage 0."""
    process = "{name: puma, num_stages: 4, threshold: null}"
    run = untrained_run(*toy_settings(f"process={process}", values=2), model=exact(toy(values=2, length=6)))
    shown = simulate_masking(run, run.task.validation(4), copies=4, least=1, on_progress=lambda share: None)
    assert len(shown) >= 3
    life = [(batch.xt == run.task.tokens.mask_id).sum(dim=1) for batch in shown]
    for earlier, later in pairwise(life):
        assert ((later < earlier) | (later > 3)).all()  # ever more is revealed, until the row is entered anew
