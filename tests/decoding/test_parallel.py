"""What revealing several tokens at once can lose, on distributions small enough to enumerate."""

import math
from collections.abc import Iterator
from itertools import permutations

import pytest
import torch
from torch import Tensor

from tests.helpers import toy
from unmask.reveal import CONFIDENCES, EntropyBound, ErrorBudget, Factor, RevealRule, RevealState
from unmask.tasks.toy import Toy


def canvases(sharpness: float) -> Iterator[tuple[Toy, Tensor, Tensor]]:
    """Random joint distributions of 4 tokens, a canvas (4,) with nothing or one token given, exact conditionals."""
    for seed in range(25):
        task = toy(values=3, length=4, sharpness=sharpness, seed=seed)
        mask = task.tokens.mask_id
        for given in (mask, seed % 3):
            xt = torch.tensor([given, mask, mask, mask])
            yield task, xt, task.posterior(xt.unsqueeze(0), torch.arange(4))


def chosen(rule: RevealRule, order: str, xt: Tensor, log_probs: Tensor, mask_id: int) -> list[int]:
    """Where `rule` reveals in `xt`."""
    eligible = (xt == mask_id).unsqueeze(0)
    entropy = -CONFIDENCES["neg_entropy"](log_probs)
    state = RevealState(
        score=CONFIDENCES[order](log_probs).unsqueeze(0),
        eligible=eligible,
        top1=CONFIDENCES["prob"](log_probs).unsqueeze(0),
        entropy=entropy.unsqueeze(0),
        step=torch.tensor([0]),
        num_masked=eligible.sum(-1),
        num_masked_at_start=eligible.sum(-1),
    )
    return rule(state)[0].nonzero().flatten().tolist()


def joint(task: Toy, xt: Tensor, places: list[int]) -> dict[tuple[int, ...], float]:
    """The exact distribution of the tokens at `places`, given what is visible in `xt`."""
    is_compatible = ((task.sequences == xt) | (xt == task.tokens.mask_id)).all(dim=-1)
    mass: dict[tuple[int, ...], float] = {}
    for sequence, p in zip(
        task.sequences[:, places].tolist(), (is_compatible * task.probabilities).tolist(), strict=True
    ):
        mass[tuple(sequence)] = mass.get(tuple(sequence), 0.0) + p
    total = math.fsum(mass.values())
    return {tokens: p / total for tokens, p in mass.items()}


def one_by_one(task: Toy, xt: Tensor, places: tuple[int, ...]) -> Tensor:
    """`xt` with the likeliest token at each of `places`, each knowing those before it."""
    xt = xt.clone()
    for place in places:
        xt[place] = task.posterior(xt.unsqueeze(0), torch.tensor([place]))[0].argmax()
    return xt


def test_with_factor_1_at_once_is_one_by_one() -> None:
    """In whatever order, and the likeliest tokens jointly (2505.22618, theorem 1)."""
    num_parallel = 0
    for task, xt, log_probs in canvases(sharpness=6):
        places = chosen(Factor(1.0), "prob", xt, log_probs, task.tokens.mask_id)
        if len(places) == 1:
            continue
        num_parallel += 1
        at_once = xt.index_copy(0, torch.tensor(places), log_probs[places].argmax(-1))
        for order in permutations(places):
            assert torch.equal(one_by_one(task, xt, order), at_once)
        likely = joint(task, xt, places)
        assert max(likely, key=lambda tokens: likely[tokens]) == tuple(at_once[places].tolist())
    assert num_parallel > 10


def test_a_larger_factor_promises_nothing() -> None:
    """The test above can fail."""
    differs = 0
    for task, xt, log_probs in canvases(sharpness=2):
        places = chosen(Factor(9.0), "prob", xt, log_probs, task.tokens.mask_id)
        at_once = xt.index_copy(0, torch.tensor(places), log_probs[places].argmax(-1))
        differs += not torch.equal(one_by_one(task, xt, tuple(places)), at_once)
    assert differs > 5


@pytest.mark.parametrize("order", ["prob", "neg_entropy"])
@pytest.mark.parametrize("gamma", [0.05, 0.2, 0.5, 1.0])
def test_the_entropy_bound_bounds_what_is_lost(gamma: float, order: str) -> None:
    """KL(joint || product of the conditionals) <= gamma, of the tokens that are revealed at once (2505.24857)."""
    losses, of_all = [], []
    for task, xt, log_probs in canvases(sharpness=3):

        def lost(places: list[int], task: Toy = task, xt: Tensor = xt, log_probs: Tensor = log_probs) -> float:
            return sum(
                p * (math.log(p) - sum(float(log_probs[i, v]) for i, v in zip(places, tokens, strict=True)))
                for tokens, p in joint(task, xt, places).items()
                if p > 0
            )

        places = chosen(EntropyBound(gamma), order, xt, log_probs, task.tokens.mask_id)
        if len(places) > 1:
            losses.append(lost(places))
        of_all.append(lost((xt == task.tokens.mask_id).nonzero().flatten().tolist()))
    assert max(losses) <= gamma + 1e-12
    assert max(losses) > 0
    assert gamma == 1.0 or max(of_all) > gamma  # revealing all would lose more


@pytest.mark.parametrize("budget", [0.05, 0.2, 0.5])
def test_the_budget_bounds_the_probability_of_an_error(budget: float) -> None:
    """A union bound: the likeliest tokens, revealed at once, are all right with probability above 1 - budget."""
    errors, of_all = [], []
    for task, xt, log_probs in canvases(sharpness=3):

        def error(places: list[int], task: Toy = task, xt: Tensor = xt, log_probs: Tensor = log_probs) -> float:
            return 1 - joint(task, xt, places).get(tuple(log_probs[places].argmax(-1).tolist()), 0.0)

        places = chosen(ErrorBudget(budget), "prob", xt, log_probs, task.tokens.mask_id)
        if len(places) > 1:
            errors.append(error(places))
        of_all.append(error((xt == task.tokens.mask_id).nonzero().flatten().tolist()))
    assert 0 < max(errors) < budget
    assert max(of_all) > budget  # revealing all would err more often
