"""Decoding with a self-conditioned model."""

import pytest
import torch
from torch import Tensor

from tests.helpers.decoding import MASK, TOKENS, decode, prompts, same
from tests.helpers.decoding import denoiser as plain
from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig
from unmask.errors import UserError
from unmask.models.denoiser import Denoiser


def denoiser(**settings: object) -> Denoiser:
    model = plain(self_conditioning=True, **settings)
    torch.nn.init.normal_(model.backbone.conditioning.weight, generator=torch.Generator().manual_seed(1))
    return model


def by_hand(model: Denoiser, xt: Tensor, per_step: int, size: int) -> Tensor:
    """One canvas, greedy, block by block: what was said of every masked position is told to it in the next step."""
    xt = xt.clone()
    estimate = torch.zeros(1, len(xt), model.backbone.config.dim, dtype=torch.float64)
    while (masked := (xt == MASK).nonzero().flatten()).numel():
        p = model.logits(xt[None], masked, estimate).softmax(-1)
        estimate = torch.zeros_like(estimate)
        estimate[0, masked] = p @ model.backbone.embedding.weight
        here = masked // size == masked[0] // size
        best = p[here].amax(-1).sort(descending=True, stable=True).indices[:per_step]
        xt[masked[here][best]] = p[here].argmax(-1)[best]
        estimate[0, xt != MASK] = 0
    return xt


@pytest.mark.parametrize("alignment", ["same", "next"])
@pytest.mark.parametrize("size", [4, 16])
def test_each_step_is_told_what_the_last_one_said(alignment: str, size: int) -> None:
    """Of a model of whole canvases all that is masked is told, also outside the block that is being decoded."""
    model = denoiser(alignment=alignment)
    decoded = decode(model, prompts(), tokens_per_step=3, block_size=size, stop_early=False)
    with torch.no_grad():
        for row in (2, 3, 5):
            assert torch.equal(by_hand(model, prompts()[row], 3, size), decoded.tokens[row])
    untold = build_decoder(DecodeConfig(tokens_per_step=3, stop_early=False), plain(alignment=alignment), TOKENS)
    assert not torch.equal(untold.decode(prompts()).tokens, decoded.tokens)  # or the test would not tell


def test_there_are_as_many_passes_as_without() -> None:
    model = denoiser()
    passes = []
    model.backbone.register_forward_pre_hook(lambda *_: passes.append(1))
    decoded = decode(model, prompts()[:1], tokens_per_step=2, stop_early=False)
    assert len(passes) == decoded.nfe.item() == 7  # 13 positions


@pytest.mark.parametrize("alignment", ["same", "next"])
def test_the_cache_of_a_block_model_changes_nothing(alignment: str) -> None:
    model = denoiser(block_size=4, alignment=alignment)
    settings = {"threshold": 0.4, "temperature": 0.8}
    assert same(decode(model, prompts(), cache="block", **settings), decode(model, prompts(), **settings))


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_that_is_always_refreshed_changes_nothing(cache: str) -> None:
    model, settings = denoiser(), {"block_size": 4, "tokens_per_step": 2}
    cached = decode(model, prompts(), cache=cache, refresh_every=1, **settings)
    assert same(cached, decode(model, prompts(), **settings))


DECODERS = [
    ({}, {"threshold": 0.4, "temperature": 0.7}),
    ({"alignment": "next"}, {"steps": 6, "remask": "p2", "temperature": 1.0}),
    ({}, {"steps": 6, "remask": "rcr", "temperature": 1.0}),
    ({}, {"block_size": 4, "tokens_per_step": 2, "forbid": [2]}),
    ({"block_size": 4}, {"cache": "block", "threshold": 0.4}),
    ({}, {"block_size": 4, "cache": "dual", "refresh_every": 3, "threshold": 0.4}),
]


@pytest.mark.parametrize(("model_settings", "settings"), DECODERS)
def test_a_row_does_not_depend_on_its_batch(model_settings: dict, settings: dict) -> None:
    """Alone, in another order, beside other lengths: the same tokens, in fp64."""
    model, xt = denoiser(**model_settings), prompts()
    together = decode(model, xt, **settings)
    rows = torch.tensor([2, 0, 5])
    shuffled = decode(model, xt, rows, **settings)
    assert torch.equal(shuffled.tokens, together.tokens[rows])
    for row in (2, 5):
        alone = decode(model, xt, torch.tensor([row]), **settings)
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert alone.nfe[0] == together.nfe[row]


def test_with_weights_of_0_it_decodes_as_the_plain_model() -> None:
    settings = {"steps": 6, "remask": "p2", "temperature": 1.0}
    told = decode(plain(self_conditioning=True), prompts(), **settings)
    assert same(told, decode(plain(), prompts(), **settings))


def test_guidance_is_refused() -> None:
    with pytest.raises(UserError, match=r"decode\.guidance=1\.5: .*set decode\.guidance=0"):
        build_decoder(DecodeConfig(guidance=1.5), denoiser(), TOKENS)
