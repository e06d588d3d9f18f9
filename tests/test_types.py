from types import SimpleNamespace

import pytest
import torch

from unmask.errors import UserError
from unmask.masking.process import PAD_MULTIPLE, make_batch, masked_batch
from unmask.types import CleanBatch, TokenStats, forbid_tokens


def batch_of(rows: int = 6, length: int = 11, seed: int = 0):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(9, (rows, length), generator=generator)
    is_masked = torch.rand(rows, length, generator=generator) < 0.4
    xt = torch.where(is_masked, 9, x0)
    return masked_batch(x0, xt, 9, 1.0 + torch.arange(rows)), is_masked


def test_scored_positions_are_the_masked_ones_in_order_and_padded() -> None:
    batch, is_masked = batch_of()
    count = int(is_masked.sum())
    assert batch.scored[:count].tolist() == is_masked.flatten().nonzero().flatten().tolist()
    assert len(batch.scored) % PAD_MULTIPLE == 0
    assert (batch.scored[count:] == batch.x0.numel()).all()
    assert (batch.weight[count:] == 0).all()
    assert torch.equal(batch.weight[:count], (1.0 + torch.arange(6)).repeat_interleave(is_masked.sum(1)))


def test_scatter_undoes_gather_and_ignores_padding() -> None:
    batch, is_masked = batch_of()
    values = torch.rand(6, 11)
    back = batch.scatter(batch.gather(values), fill=-1.0)
    assert torch.equal(back, torch.where(is_masked, values, -1.0))


def test_split_keeps_rows_and_order() -> None:
    batch, _ = batch_of()
    values = torch.rand(6, 11)
    for parts in (1, 2, 3, 6):
        pieces = batch.split(parts)
        assert torch.equal(torch.cat([piece.xt for piece in pieces]), batch.xt)
        gathered = torch.cat([piece.gather(part) for piece, part in zip(pieces, values.chunk(parts), strict=True)])
        assert torch.equal(gathered[batch.weight > 0], batch.gather(values)[batch.weight > 0])
        assert torch.equal(torch.cat([piece.weight for piece in pieces]), batch.weight)
        assert all((piece.scored >= 0).all() and (piece.scored <= piece.x0.numel()).all() for piece in pieces)


def test_stats_from_logits_are_the_plain_formulas() -> None:
    logits, x0 = torch.randn(5, 4, requires_grad=True), torch.tensor([0, 1, 2, 3, 0])
    stats = TokenStats.from_logits(logits, x0, confidence="margin")
    p = logits.detach().softmax(-1)
    assert torch.allclose(stats.nll, -p[torch.arange(5), x0].log())
    top = p.sort(descending=True).values
    assert torch.allclose(stats.confidence, top[:, 0] - top[:, 1])
    assert torch.allclose(stats.top1, top[:, 0])
    assert stats.nll.requires_grad
    assert not stats.confidence.requires_grad
    stats.nll.sum().backward()
    assert torch.allclose(logits.grad, p - torch.nn.functional.one_hot(x0, 4), atol=1e-6)  # fp32 rounding


def test_statistics_of_bf16_logits_are_fp32() -> None:
    stats = TokenStats.from_logits(torch.randn(3, 4).bfloat16(), torch.tensor([0, 1, 2]))
    assert {stats.nll.dtype, stats.confidence.dtype, stats.top1.dtype} == {torch.float32}


def test_padding_is_finite_where_the_last_prompt_is_hidden() -> None:
    """A hidden prompt holds the mask, whose logit is -inf: read as padding, 0 x inf would make the loss NaN."""
    x0 = torch.tensor([[0, 1, 2], [3, 1, 9]])
    xt = torch.tensor([[0, 9, 9], [9, 1, 9]])
    is_masked = torch.tensor([[False, True, True], [True, False, False]])
    batch = make_batch(x0, xt, is_masked, torch.ones(2, 3))
    assert (batch.weight == 0).any()
    logits = torch.randn(2, 3, 10, requires_grad=True)
    stats = TokenStats.from_logits(forbid_tokens(batch.gather(logits), 9), batch.gather(x0))
    loss = (stats.nll * batch.weight).sum()
    assert loss.isfinite()
    assert torch.equal(batch.scatter(batch.gather(x0.float()), -1.0), torch.where(is_masked, x0.float(), -1.0))
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("x0", "prompt_mask", "message"),
    [
        (torch.zeros(1, 2).long(), torch.zeros(1, 2).long(), "prompt_mask: is of torch.int64; make it torch.bool"),
        (torch.zeros(1, 2).int(), torch.zeros(1, 2).bool(), "x0: is of torch.int32; make it torch.int64"),
    ],
)
def test_a_clean_batch_of_other_types_is_refused(x0: torch.Tensor, prompt_mask: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CleanBatch.__post_init__(SimpleNamespace(x0=x0, prompt_mask=prompt_mask))  # past the tests' own type checks


def test_an_unknown_confidence_is_named() -> None:
    with pytest.raises(UserError, match="confidence 'low': unknown; use one of prob, margin, neg_entropy"):
        TokenStats.from_logits(torch.randn(1, 3), torch.tensor([0]), confidence="low")


def test_a_device_may_be_named() -> None:
    batch, _ = batch_of()
    assert batch.to("cpu").x0.device.type == "cpu"
    clean = CleanBatch(x0=torch.zeros(1, 2).long(), prompt_mask=torch.zeros(1, 2).bool())
    assert clean.to("cpu").x0.device.type == "cpu"
