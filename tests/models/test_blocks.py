"""Attention by blocks: who sees whom, in one stream, in two, and beside a cache."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from unmask.blocks import check_block_size
from unmask.errors import UserError
from unmask.masking.process import Requirements
from unmask.models import measuring
from unmask.models.attention import Attention, KeyValueCache
from unmask.models.backends import BACKENDS, fastest_by_block
from unmask.models.build import build_denoiser
from unmask.models.denoiser import Denoiser
from unmask.models.measuring import measure_fastest
from unmask.models.transformer_config import TransformerConfig
from unmask.models.visibility import AttentionPattern, num_clean
from unmask.types import Prediction, Query, TokenSpec

MASK, LENGTH = 8, 12
TOKENS = TokenSpec(vocab_size=9, length=LENGTH, mask_id=MASK)
SMALL = {"dim": 16, "ff_dim": 24, "num_layers": 2, "num_heads": 4}
SETTINGS = {
    "rotary": {},
    "learned positions": {"learned_positions": True, "rotary": False},
    "shared heads": {"num_kv_heads": 2, "qk_norm": True, "qkv_bias": True},
    "tied head": {"tied_head": True},
    "checkpointing": {"checkpointing": True},
}
STREAMS = [(12, 4, True), (12, 4, False), (10, 4, True), (10, 4, False), (6, 1, True), (6, 1, False), (6, 6, True)]
"""Positions of a row, of a block, and whether there are two streams."""


def denoiser(block_size: int | None = 4, **settings: object) -> Denoiser:
    config = TransformerConfig(**SMALL | {"block_size": block_size} | settings)
    return build_denoiser(config, TOKENS, dtype="float64")


def mask_of(length: int, size: int, noisy: int) -> Tensor:
    """Row by row, as the paper says it: (W, W), True where the row's position sees the column's."""
    names = [("noisy", place // size) for place in range(noisy)]
    names += [("clean", place // size) for place in range(num_clean(length, size) if noisy else length)]
    seen = {
        ("noisy", "noisy"): lambda block, other: other == block,
        ("noisy", "clean"): lambda block, other: other < block,
        ("clean", "noisy"): lambda block, other: False,
        ("clean", "clean"): lambda block, other: other <= block,
    }
    return torch.tensor([[seen[one[0], other[0]](one[1], other[1]) for other in names] for one in names])


def dense(q: Tensor, k: Tensor, v: Tensor, dropout: float, seen: AttentionPattern) -> Tensor:
    """The oracle: every score is computed, and most are thrown away."""
    length = seen.noisy or q.shape[2]
    assert seen.size is not None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_of(length, seen.size, seen.noisy))


def heads(width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, width, 8, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(4)]


@pytest.mark.parametrize(("length", "size", "is_double"), STREAMS)
def test_who_sees_whom(length: int, size: int, is_double: bool) -> None:
    mask = mask_of(length, size, length if is_double else 0)
    position = torch.arange(len(mask))
    seen = AttentionPattern(size, length if is_double else 0)
    assert torch.equal(seen.rule()(position.unsqueeze(1), position), mask)
    if not is_double:
        assert torch.equal(seen.visible_until(position).clamp(max=length), mask.sum(dim=1))


@pytest.mark.parametrize(("length", "size", "is_double"), STREAMS)
@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_backends_are_the_masked_formula(backend: str, length: int, size: int, is_double: bool) -> None:
    seen = AttentionPattern(size, length if is_double else 0)
    *qkv, weight = heads(len(mask_of(length, size, seen.noisy)))
    results = []
    for run in (BACKENDS[backend], dense):
        mixed = run(*qkv, 0.0, seen)
        results.append([mixed, *torch.autograd.grad((mixed * weight).sum(), qkv)])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("is_double", [True, False])
def test_flex_attention_is_the_masked_formula(is_double: bool) -> None:
    seen = AttentionPattern(4, 12 if is_double else 0)
    q, k, v = (x.detach() for x in heads(20 if is_double else 12)[:3])
    assert torch.allclose(BACKENDS["flex"](q, k, v, 0.0, seen), dense(q, k, v, 0.0, seen), atol=1e-6)


def test_products_of_blocks_in_bfloat16() -> None:
    """A value here is about 1, its rounding step 2^-8."""
    *qkv, weight = (x.detach().bfloat16().requires_grad_() for x in heads(20))
    results = []
    for run, inputs in ((BACKENDS["matmul"], qkv), (dense, [x.detach().double().requires_grad_() for x in qkv])):
        mixed = run(*inputs, 0.0, AttentionPattern(4, 12))
        results.append([mixed, *torch.autograd.grad((mixed * weight).sum(), inputs)])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one.double(), other, atol=3e-2, rtol=3e-2)


def test_the_operation_is_one_that_a_compiler_can_trust() -> None:
    q, k, v, _ = heads(20)
    torch.library.opcheck(torch.ops.unmask.attend_by_blocks.default, (q, k, v, 4, 12, 0.0, None))


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_dropout_keeps_the_mean(backend: str) -> None:
    q, k, v = (x[:1].detach().expand(4000, -1, -1, -1) for x in heads(20)[:3])
    seen = AttentionPattern(4, 12)
    torch.manual_seed(1)
    found, kept = (
        BACKENDS[backend](q[:rows], k[:rows], v[:rows], dropout, seen) for rows, dropout in ((4000, 0.5), (1, 0.0))
    )
    assert torch.allclose(found.mean(0), kept[0], atol=0.1)
    assert not torch.equal(found[0], found[1])


def test_the_backward_pass_drops_what_the_forward_pass_dropped() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(2)
        return BACKENDS["matmul"](q, k, v, 0.3, AttentionPattern(2, 4))

    qkv = [x[:1, :1, :6, :3].detach().requires_grad_() for x in heads(6)[:3]]
    assert torch.autograd.gradcheck(attend, qkv)


def canvases(rows: int = 3) -> tuple[Tensor, Tensor]:
    """`xt`, with the first token of every row given, and `x0`."""
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randint(MASK, (rows, LENGTH), generator=generator)
    is_masked = torch.rand(rows, LENGTH, generator=generator) < 0.6
    is_masked[:, 0] = False
    return torch.where(is_masked, MASK, x0), x0


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_two_streams_are_the_masked_pass(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, of what is asked for alone."""
    model = denoiser(attention=backend, **SETTINGS[kind]).backbone
    xt, x0 = canvases()
    at = torch.tensor([59, 3, 3, 0, 21, 12, 39])  # 12 noisy and 8 clean positions a row
    results = []
    for run in (BACKENDS[backend], dense):
        monkeypatch.setitem(BACKENDS, backend, run)
        model.zero_grad()
        hidden = model.two_streams(xt, x0, at)
        (hidden * torch.arange(1.0, 8)[:, None]).sum().backward()
        results.append([hidden, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) > 15
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", SETTINGS)
def test_both_streams_have_the_same_places(kind: str) -> None:
    """Where nothing is masked they say the same."""
    model = denoiser(**SETTINGS[kind]).backbone
    _, x0 = canvases(1)
    noisy, clean = torch.arange(8), torch.arange(12, 20)
    assert torch.allclose(model.two_streams(x0, x0, noisy), model.two_streams(x0, x0, clean), atol=1e-12)


def test_dropout_trains_and_evaluation_has_none() -> None:
    model, (xt, x0), at = denoiser(dropout=0.3).backbone, canvases(), torch.arange(60)
    assert not torch.equal(model.two_streams(xt, x0, at), model.two_streams(xt, x0, at))
    model.eval()
    assert torch.equal(model.two_streams(xt, x0, at), model.two_streams(xt, x0, at))


# --- beside a cache --------------------------------------------------------------------------------------------------

ALIGNMENTS = ["same", "next"]


def positions(places: list[list[int]]) -> Tensor:
    return torch.tensor([row * LENGTH + place for row, own in enumerate(places) for place in own])


def agree(one: object, other: object) -> None:
    for name, value in vars(one).items():
        if value is not None:
            assert torch.allclose(value, getattr(other, name), rtol=0, atol=1e-10), name


def within(model: Denoiser, xt: Tensor, at: Tensor, ask: Query | None = None, **window: Any) -> Prediction:
    return model.predict_from_hidden(model.hidden_within(xt, at, **window), ask or Query())


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@torch.no_grad()
def test_blocks_are_predicted_beside_what_is_known_of_earlier_ones(kind: str, alignment: str) -> None:
    """Each row at a block of its own, and rows that leave and come back."""
    model = denoiser(alignment=alignment, **SETTINGS[kind]).eval()
    xt, x0 = canvases()
    cache = KeyValueCache(LENGTH, 3)
    block = [1, 0, 2]
    canvas = torch.stack([torch.cat([x0[row, : 4 * b], xt[row, 4 * b :]]) for row, b in enumerate(block)])
    every = torch.zeros(3, dtype=torch.long)
    for width in (4, 8):  # the first block of all rows, then both that two of them have finished
        within(model, canvas, positions([[1]] * 3), start=every, width=width, cache=cache)
        assert cache.width == width
    start = 4 * torch.tensor(block)
    for rows in (None, torch.tensor([2, 0]), torch.tensor([1])):
        some = range(3) if rows is None else rows.tolist()
        at = positions(
            [[4 * block[row] + place for place in (3, 1, 0) if (block[row], place) != (0, 0)] for row in some]
        )
        mine = canvas[list(some)]
        found = within(model, mine, at, start=start[list(some)], width=4, cache=cache, rows=rows)
        agree(found, model.predict(mine, at))


@pytest.mark.parametrize("block_size", [4, None])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@torch.no_grad()
def test_a_whole_canvas_that_is_read_is_predicted_as_ever(block_size: int | None, alignment: str) -> None:
    model = denoiser(block_size, alignment=alignment).eval()
    xt, _ = canvases()
    cache, at = KeyValueCache(LENGTH, 3), positions([[1, 11], [], [5, 4]])
    ask = Query(confidence="margin", has_entropy=True)
    start = torch.zeros(3, dtype=torch.long)
    found = within(model, xt, at, start=start, width=LENGTH, cache=cache, ask=ask)
    agree(found, model.predict(xt, at, ask))
    assert cache.width == LENGTH


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@torch.no_grad()
def test_without_blocks_a_window_sees_the_rest_as_it_was(alignment: str) -> None:
    """Nothing has changed outside: the same as ever. What has changed there is not seen until it is read."""
    model = denoiser(None, alignment=alignment, num_layers=1).eval()
    xt, x0 = canvases()
    cache, start, at = KeyValueCache(LENGTH, 3), torch.tensor([0, 5, 8]), positions([[1, 3], [5, 8], [10, 11]])
    within(model, xt, at[:1], start=torch.zeros_like(start), width=LENGTH, cache=cache)
    place = torch.arange(LENGTH)
    is_inside = (place >= start.unsqueeze(1)) & (place < start.unsqueeze(1) + 4)
    inside = torch.where(is_inside, x0, xt)  # of one layer, whose keys outside do not depend on what is inside
    assert not torch.equal(inside, xt)
    found = within(model, inside, at, start=start, width=4, cache=cache)
    agree(found, model.predict(inside, at))
    place_before = (start - 1).clamp(min=0).unsqueeze(1)  # read too, with alignment=next
    outside = torch.where(is_inside | (place == place_before), inside, (inside + 1) % MASK)
    agree(found, within(model, outside, at, start=start, width=4, cache=cache))


def test_position_0_cannot_be_predicted_beside_a_cache() -> None:
    model, (xt, _) = denoiser(alignment="next"), canvases()
    with torch.no_grad(), pytest.raises(UserError, match="position 0 of an example is to be predicted"):
        within(
            model,
            xt,
            torch.tensor([0]),
            start=torch.zeros(3, dtype=torch.long),
            width=4,
            cache=KeyValueCache(LENGTH, 3),
        )


# --- what is chosen, and what is refused -----------------------------------------------------------------------------


def test_the_rule_for_blocks() -> None:
    case = {"device": "cpu", "dtype": torch.float32, "num_blocks": 8, "with_gradient": True, "can_flex": False}
    many, few = case, case | {"num_blocks": 4}
    assert fastest_by_block(**many) == fastest_by_block(**few | {"dtype": torch.bfloat16}) == "matmul"
    assert fastest_by_block(**few) == fastest_by_block(**many | {"with_gradient": False}) == "sdpa"
    cuda = case | {"device": "cuda"}
    assert fastest_by_block(**cuda) == fastest_by_block(**cuda | {"can_flex": True, "with_gradient": False}) == "sdpa"
    assert fastest_by_block(**cuda | {"can_flex": True}) == "flex"


def test_auto_follows_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    for name in ("sdpa", "matmul"):
        monkeypatch.setitem(BACKENDS, name, lambda q, k, v, dropout, seen, name=name: used.append((name, seen)) or v)
    layer = Attention(16, 2, 2, qkv_bias=False, dropout=0.0, seen=AttentionPattern(4))
    layer(torch.randn(1, 36, 16), None, noisy=20)
    layer(torch.randn(1, 28, 16), None, noisy=16)
    with torch.no_grad():
        layer(torch.randn(1, 20, 16), None)
    assert used == [
        ("matmul", AttentionPattern(4, 20)),
        ("sdpa", AttentionPattern(4, 16)),
        ("sdpa", AttentionPattern(4)),
    ]


def test_few_blocks_are_measured_as_they_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = []

    def run(command: list[str], **_: object) -> None:
        cases.append(measuring.Case(**measuring.json.loads(command[-1])))
        raise OSError

    monkeypatch.setattr(measuring.subprocess, "run", run)
    for size in (3, 2):
        assert measure_fastest(denoiser(size), rows=2, length=LENGTH, dtype=torch.float32) is None
    threads = torch.get_num_threads()
    assert cases == [measuring.Case(2, 4, LENGTH + 9, 4, "float32", threads, block_size=3, noisy=LENGTH)]


def test_both_kinds_of_attention_can_be_measured() -> None:
    case = measuring.Case(1, 2, 20, 4, "float32", 1, block_size=4, noisy=12)
    assert all(measuring._seconds(BACKENDS[name], case) < 60 for name in ("sdpa", "matmul"))


@pytest.mark.parametrize(
    ("size", "fix"), [(48, "use 32 or 64"), (3, "use 2 or 4"), (300, "use 128 or 256"), (255, "use 128 or 256")]
)
def test_a_block_size_must_divide_the_row(size: int, fix: str) -> None:
    with pytest.raises(UserError, match=rf"process\.block_size={size} does not divide rows of 256 .* {fix}$"):
        check_block_size(size, 256, "process.block_size")
    for size in (1, 2, 64, 256):
        check_block_size(size, 256, "process.block_size")


def test_a_model_whose_blocks_do_not_fill_the_row_is_not_built() -> None:
    with pytest.raises(UserError, match=r"model\.block_size=5 does not divide rows of 12 .* use 4 or 6"):
        denoiser(5)


@pytest.mark.parametrize(("needed", "own"), [(4, None), (None, 4), (4, 6)])
def test_a_process_gets_the_blocks_that_it_needs(needed: int | None, own: int | None) -> None:
    config = TransformerConfig(**SMALL, block_size=own)
    said = rf"process\.block_size={needed or 'null'}, model\.block_size={own or 'null'}: set both"
    with pytest.raises(UserError, match=said):
        build_denoiser(config, TOKENS, requirements=Requirements(block_size=needed))


def test_a_causal_model_has_no_blocks() -> None:
    with pytest.raises(ValidationError, match=r"set model\.causal=false, or model\.block_size=null"):
        TransformerConfig(**SMALL, causal=True, alignment="next", block_size=4)
