"""AdamW and Muon: which parameters each has, what a step does, and what survives it."""

import copy
import math
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import assert_same
from tests.helpers.runs import assert_goes_on_exactly, toy_trainer
from unmask.config.run import OptimConfig
from unmask.errors import UserError
from unmask.training.muon import orthogonalize
from unmask.training.optim import (
    Optimizer,
    about_other_length,
    about_warmup,
    hidden_matrices,
    learning_rate,
)

MUON = ["optim.name=muon", "optim.warmup_steps=0"]


def newton_schulz(matrix: Tensor) -> Tensor:
    """Five quintic steps in fp64, written from the formula: X <- aX + (bA + cA^2)X with A = XX^T."""
    x = matrix / matrix.norm()
    x = x.T if len(x) > x.shape[1] else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if len(matrix) > matrix.shape[1] else x


@pytest.mark.parametrize("is_tied", [False, True])
def test_muon_has_the_matrices_of_the_blocks(is_tied: bool) -> None:
    model = toy_trainer(*MUON, f"model.tied_head={str(is_tied).lower()}").model
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    names = [name_of[id(matrix)] for matrix in hidden_matrices(model)]
    blocks = [n for n, p in model.named_parameters() if n.startswith("backbone.blocks.") and p.ndim == 2]
    assert sorted(names) == sorted(blocks)
    assert len(names) == 7 * len(model.backbone.blocks)


def test_every_parameter_has_one_optimizer() -> None:
    trainer = toy_trainer(*MUON)
    owned = [p for member in trainer.optimizer.members for group in member.param_groups for p in group["params"]]
    assert sorted(map(id, owned)) == sorted(map(id, trainer.model.parameters()))


class Layers(nn.Module):
    """Layers of several shapes, two of each."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        shapes = [(8, 24), (24, 8), (16, 16)] * 2
        self.layers = nn.ModuleList(nn.Linear(m, n, bias=False, dtype=dtype) for n, m in shapes)
        if dtype != torch.float64:
            self.compute_dtype = "bfloat16"

    def set_gradients(self, seed: int) -> None:
        for number, parameter in enumerate(self.parameters()):
            generator = torch.Generator().manual_seed(100 * seed + number)
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def test_steps_are_those_of_the_paper() -> None:
    model = Layers(torch.float64)
    optimizer = Optimizer(model, OptimConfig(name="muon", muon_lr=2.0, weight_decay=0.1))
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    momenta = [torch.zeros_like(weight) for weight in weights]
    for step in range(3):
        model.set_gradients(step)
        for number, parameter in enumerate(model.parameters()):
            momenta[number] = 0.95 * momenta[number] + 0.05 * parameter.grad
            update = newton_schulz(0.05 * parameter.grad + 0.95 * momenta[number])
            scale = 0.2 * math.sqrt(max(parameter.shape))
            weights[number] = weights[number] * (1 - 0.02 * 0.1) - 0.02 * scale * update
        optimizer.step(0.01, torch.tensor(False))
    for parameter, expected in zip(model.parameters(), weights, strict=True):
        assert torch.allclose(parameter, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_heads_are_made_orthogonal_on_their_own(kv_heads: int) -> None:
    def made(*overrides: str) -> Optimizer:
        sizes = ["model.dim=16", "model.num_heads=4", f"model.num_kv_heads={kv_heads}", "model.head_dim=6"]
        return toy_trainer(*MUON, *sizes, *overrides).optimizer

    optimizer, plain = made("optim.muon_heads=true", "optim.weight_decay=0"), made("optim.weight_decay=0")
    weights = {name: weight.detach().clone() for name, weight in optimizer.model.named_parameters()}
    for each in (optimizer, plain):
        for number, weight in enumerate(each.model.parameters()):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)).to(weight)
        each.step(0.01, torch.tensor(False))
    others = dict(plain.model.named_parameters())
    heads = {"q.weight": (4, 0), "k.weight": (kv_heads, 0), "v.weight": (kv_heads, 0), "out.weight": (4, 1)}
    for name, weight in optimizer.model.named_parameters():
        moved, gradient = weights[name] - weight, weight.grad
        if ".attention." not in name:
            assert torch.equal(weight, others[name]), name
            continue
        count, dim = heads[name.rpartition("attention.")[2]]
        for own, momentum in zip(moved.chunk(count, dim), gradient.chunk(count, dim), strict=True):
            expected = 0.03 * 0.2 * math.sqrt(max(own.shape)) * newton_schulz(momentum)  # muon_lr is 3
            assert torch.allclose(own, expected, rtol=0, atol=1e-12), name


def test_heads_need_attention_of_ours() -> None:
    with pytest.raises(UserError, match=r"optim\.muon_heads"):
        Optimizer(Layers(torch.float64), OptimConfig(name="muon", muon_heads=True))


def test_steps_are_those_of_pytorch() -> None:
    ours, theirs = Layers(torch.float32), Layers(torch.float32)
    theirs.load_state_dict(ours.state_dict())
    first = copy.deepcopy(ours.state_dict())
    optimizer = Optimizer(ours, OptimConfig(name="muon", muon_lr=2.0, weight_decay=0.1))
    other = torch.optim.Muon(
        theirs.parameters(), lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(3):
        for model in (ours, theirs):
            model.set_gradients(step)
        optimizer.step(0.01, torch.tensor(False))
        other.step()
    for name, weight in theirs.state_dict().items():
        # Both multiply in bfloat16, whose steps of 2^-8 five iterations enlarge; the sums are in another order.
        assert (ours.state_dict()[name] - weight).norm() < 0.02 * (weight - first[name]).norm(), name
    state = {name: values["momentum_buffer"] for name, values in optimizer.state_dict().items()}
    for name, parameter in theirs.named_parameters():
        assert torch.allclose(state[name], other.state[parameter]["momentum_buffer"], rtol=1e-6, atol=1e-7)


def test_singular_values_come_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(4, 24, 16, generator=generator, dtype=torch.float64)
    found = torch.linalg.svdvals(orthogonalize(matrices))
    assert 0.6 < found.min() < found.max() < 1.3
    assert torch.equal(orthogonalize(torch.zeros(1, 3, 2)), torch.zeros(1, 3, 2))


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_bad_step_leaves_all_as_it_is(steps_before: int) -> None:
    trainer = toy_trainer(*MUON)
    for _ in range(steps_before):
        trainer.step()
    weights, state = (copy.deepcopy(part.state_dict()) for part in (trainer.model, trainer.optimizer))
    for parameter in trainer.model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    trainer.optimizer.step(0.01, torch.tensor(True))
    assert_same(trainer.model.state_dict(), weights)
    if steps_before:
        assert_same(trainer.optimizer.state_dict(), state)
    trainer.optimizer.zero_grad()
    assert math.isfinite(trainer.step().grad_norm.item())


def test_a_bad_step_and_none_are_the_same_from_then_on() -> None:
    ours, other = toy_trainer(*MUON), toy_trainer(*MUON)
    for parameter in ours.model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    ours.optimizer.step(0.01, torch.tensor(True))
    ours.optimizer.zero_grad()
    assert [ours.step().loss.item() for _ in range(3)] == [other.step().loss.item() for _ in range(3)]
    assert_same(ours.optimizer.state_dict(), other.optimizer.state_dict())


@pytest.mark.parametrize("heads", [False, True])
def test_a_run_goes_on_exactly(heads: bool) -> None:
    settings = [*MUON, f"optim.muon_heads={str(heads).lower()}"]
    state = assert_goes_on_exactly(toy_trainer(*settings), toy_trainer(*settings))
    assert set(state["optimizer"]["backbone.blocks.0.attention.q.weight"]) == {"momentum_buffer"}
    assert set(state["optimizer"]["backbone.embedding.weight"]) == {"exp_avg", "exp_avg_sq", "step"}


def test_wsd_is_stable_and_then_falls_in_a_line() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=10, schedule="wsd", decay_share=0.25)
    rates = [learning_rate(step, 200, config) for step in range(201)]
    assert rates[0] == pytest.approx(0.1)
    assert set(rates[9:151]) == {1.0}
    assert rates[175] == pytest.approx(0.5)
    assert rates[200] == 0.0
    # A longer run is the same until the shorter one begins to fall: one run has the budgets of several.
    assert [learning_rate(step, 400, config) for step in range(151)] == rates[:151]


@pytest.mark.parametrize(("warmup", "share"), [(100, 1.0), (60, 0.5), (150, 0.67), (300, 0.2), (81, 0.21)])
def test_a_warmup_that_reaches_into_the_fall_makes_no_jump(warmup: int, share: float) -> None:
    config = OptimConfig(lr=1.0, warmup_steps=warmup, schedule="wsd", decay_share=share)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    rise, fall = 1 / warmup, 1 / round(100 * share)
    changes = [after - before for before, after in pairwise(rates)]
    top = rates.index(max(rates))
    assert changes[: top - 1] == pytest.approx([rise] * (top - 1))
    assert all(-fall - 1e-9 <= change <= rise + 1e-9 for change in changes)
    assert changes[top + 1 :] == pytest.approx([-fall] * (99 - top))
    said = about_warmup(100, config)
    assert said is not None
    assert f"optim.warmup_steps={warmup} reaches into the last {round(100 * share)} of 100 steps" in said
    assert f"optim.decay_share={share:g}" in said
    assert f"only comes to {max(rates):.3g} of optim.lr=1;" in said


def test_a_warmup_that_ends_before_the_fall_is_not_spoken_of() -> None:
    # The last step of a warm-up of 3 is the first of the fall, at the whole rate: 0.003 * 3 / 3, which is rounded.
    for warmup in (2, 3):
        assert about_warmup(10, OptimConfig(lr=0.003, warmup_steps=warmup, schedule="wsd", decay_share=0.8)) is None
    assert about_warmup(100, OptimConfig(warmup_steps=100)) is None
    assert "is more than the run's steps (100)" in (about_warmup(100, OptimConfig(warmup_steps=101)) or "")


def test_what_is_said_of_schedules_is_true_of_their_rates() -> None:
    """Against all rates, one by one; and of long schedules without looking at each."""
    for steps, warmup, share in product((1, 7, 40), (0, 1, 5, 39, 40, 90), (0.01, 0.33, 0.67, 1.0)):
        config = OptimConfig(lr=0.003, warmup_steps=warmup, schedule="wsd", decay_share=share)
        rates = [learning_rate(step, steps, config) for step in range(steps)]
        if said := about_warmup(steps, config):
            assert f"only comes to {max(rates):.3g} of" in said
        for now, step in product((2, 30), (1, 20)):
            others = [learning_rate(i, now, config) for i in range(step)]
            same = [i for i, (old, new) in enumerate(zip(rates, others, strict=False)) if old != new]
            if step <= steps != now:
                first = same[0] if same else step
                said = about_other_length(step, steps, now, config)
                assert (said is None) == (step <= first)
                assert said is None or f"from a checkpoint of step {first} or before" in said
    config = OptimConfig(warmup_steps=9 * 10**9, schedule="wsd")
    assert about_warmup(10**10, config)
    assert about_other_length(9 * 10**9, 10**10, 2 * 10**10, config)


def test_schedules_of_two_lengths_agree_until_the_first_of_them_falls() -> None:
    config = OptimConfig(warmup_steps=100, schedule="wsd", decay_share=0.5)
    before, now = ([learning_rate(step, steps, config) for step in range(120)] for steps in (120, 400))
    first = next(step for step in range(120) if before[step] != now[step])
    assert 60 < first < 90  # the rise stays the lower line for a while after the fall has begun
    assert about_other_length(first, 120, 400, config) is None
    assert f"from a checkpoint of step {first} or before" in (about_other_length(first + 1, 120, 400, config) or "")
