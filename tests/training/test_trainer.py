import math

import pytest
import torch

from tests.helpers.runs import assert_goes_on_exactly, toy_trainer
from unmask.config import recipes
from unmask.config.registry import resolve
from unmask.config.run import OptimConfig
from unmask.models.attention import Attention
from unmask.training import trainer as trainer_module
from unmask.training.optim import Optimizer, learning_rate
from unmask.training.trainer import Trainer


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    batch = trainer.process.next_batch(trainer.stream)
    trainer._forward_backward(batch)
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("process", ["{name: uniform}", "{name: puma, num_stages: 3}"])
@pytest.mark.parametrize("parts", [2, 3, 12])
def test_accumulation_gives_the_gradients_of_the_whole_batch(process: str, parts: int) -> None:
    """Raw gradients: Adam would hide a wrong factor."""
    whole = gradients(toy_trainer(f"process={process}"))
    accumulated = gradients(toy_trainer(f"process={process}", f"train.accumulate={parts}"))
    for name, gradient in whole.items():
        assert torch.allclose(accumulated[name], gradient, rtol=1e-9, atol=1e-12), name


def test_the_loss_is_the_mean_over_rows_of_the_mean_over_masked_tokens() -> None:
    trainer = toy_trainer("process.name=uniform")
    batch = trainer.process.next_batch(trainer.stream)
    loss, _ = trainer._forward_backward(batch)
    is_masked = batch.xt == 3
    at = is_masked.flatten().nonzero().squeeze(1)
    nll = -trainer.model.logits(batch.xt, at).log_softmax(-1).gather(1, batch.x0.flatten()[at, None]).squeeze(1)
    dense = torch.zeros(is_masked.shape, dtype=nll.dtype).masked_scatter(is_masked, nll)
    assert loss.item() == pytest.approx((dense.sum(1) / is_masked.sum(1)).mean().item(), rel=1e-12)


def test_accumulated_statistics_move_the_pool_as_the_whole_batch_does() -> None:
    settings = ["process={name: puma, num_stages: 3, threshold: 0.5}"]
    whole, parts = toy_trainer(*settings), toy_trainer(*settings, "train.accumulate=4")
    for _ in range(8):
        whole.step()
        parts.step()
        assert torch.equal(whole.process.rows.is_masked, parts.process.rows.is_masked)


@pytest.mark.parametrize("process", ["{name: uniform}", "{name: puma, num_stages: 3, threshold: 0.9}"])
def test_training_learns(process: str) -> None:
    trainer = toy_trainer(f"process={process}", "train.steps=200", "train.batch_size=64", "data.sharpness=4.0")
    first = trainer.step().loss.item()
    for _ in range(199):
        report = trainer.step()
    assert report.loss.item() < 0.75 * first


def test_gradients_are_clipped_and_reported_before_clipping() -> None:
    trainer = toy_trainer("optim.grad_clip=1e-3")
    clipped: list[float] = []

    def remember(*_: object) -> None:
        clipped.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm().item())

    trainer.optimizer.members[0].register_step_pre_hook(remember)
    report = trainer.step()
    assert report.grad_norm > 0.1
    assert clipped == [pytest.approx(1e-3, rel=1e-2)]  # clip_grad_norm_ adds 1e-6 to the norm
    assert toy_trainer("optim.grad_clip=null").step().grad_norm.item() == pytest.approx(report.grad_norm.item())


def test_dropout_draws_from_a_state_that_is_saved() -> None:
    trainer, other = (toy_trainer("model.dropout=0.2") for _ in range(2))
    assert_goes_on_exactly(trainer, other)


def test_epochs_count_the_data_set() -> None:
    # 3^6 = 729 examples, batches of 12
    assert toy_trainer("train.steps=null", "train.epochs=2").num_steps == math.ceil(2 * 729 / 12)


def test_learning_rate_warms_up_and_falls() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=10)
    rates = [learning_rate(step, 110, config) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert rates[110] == pytest.approx(0.0)
    constant = OptimConfig(lr=1.0, warmup_steps=10, schedule="constant")
    assert learning_rate(100, 110, constant) == 1.0
    assert learning_rate(0, 5, OptimConfig(lr=1.0, warmup_steps=0)) == 1.0


def test_weight_decay_is_on_matrices_only() -> None:
    optimizer = Optimizer(torch.nn.Linear(3, 3), OptimConfig(weight_decay=0.3)).members[0]
    decays = {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {2: 0.3, 1: 0.0}


def test_attention_is_measured_once_and_then_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run goes on with what it had, whatever would be the fastest now."""
    config = recipes.load("debug", ["train.batch_size=8", "train.accumulate=2"])
    task = resolve("task", config.task.name).from_config(config.data)
    made = Trainer(config, task.tokens, task.synthetic_stream(0))
    asked = []
    monkeypatch.setattr(trainer_module, "measure_fastest", lambda model, **case: asked.append(case) or "matmul")

    def chosen() -> set[str | None]:
        return {module.training_backend for module in made.model.modules() if isinstance(module, Attention)}

    made.choose_attention()  # not compiled: the rule
    assert (made.attention, chosen(), asked) == (None, {None}, [])
    made.is_compiled = True
    made.choose_attention()
    assert (made.attention, chosen()) == ("matmul", {"matmul"})
    assert asked == [{"rows": 4, "length": 81, "dtype": torch.float32}]
    made.choose_attention("sdpa")
    assert (made.attention, chosen()) == ("sdpa", {"sdpa"})
    assert len(asked) == 1


def test_a_batch_without_masks_is_legal() -> None:
    trainer = toy_trainer("process={name: uniform, masking: independent}", "train.batch_size=1", "data={length: 1}")
    reports = [trainer.step() for _ in range(12)]
    empty = [report for report in reports if not (report.batch.weight > 0).any()]
    assert empty
    assert all(report.metrics()["train/top1"] == 0 for report in empty)
