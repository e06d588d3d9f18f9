"""Decoding beside a cache of keys and values."""

import pytest
import torch

from tests.helpers.decoding import LENGTH, MASK, TOKENS, decode, denoiser, prompts, same
from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig
from unmask.decoding.windows import Blocks, BlockWindow, DualWindow, PrefixWindow
from unmask.errors import UserError

RULES = [
    {"tokens_per_step": 2},
    {"confidence": "margin", "steps": 7, "schedule": "cosine"},
    {"threshold": 0.4, "temperature": 0.8, "top_p": 0.9},
    {"confidence": "neg_entropy", "entropy_bound": 1.0, "stop_early": False},
]


@pytest.mark.parametrize("settings", RULES)
@pytest.mark.parametrize("alignment", ["same", "next"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_the_cache_of_a_block_model_changes_nothing(
    block_size: int, alignment: str, settings: dict[str, object]
) -> None:
    """Tokens, passes, and the steps of every reveal: each row is at a block of its own."""
    model, xt = denoiser(block_size=block_size, alignment=alignment), prompts()
    assert same(decode(model, xt, cache="block", **settings), decode(model, xt, **settings))


@pytest.mark.parametrize("block_size", [4, None])
def test_without_a_cache_a_block_model_is_read_up_to_its_block(block_size: int | None) -> None:
    """What follows the block is not read; a model without blocks reads all."""
    model, seen = denoiser(block_size=block_size), set[int]()
    backbone = model.backbone.forward
    model.backbone.forward = lambda xt, at: (seen.add(xt.shape[1]), backbone(xt, at))[1]
    decode(model, prompts()[2:3], stop_early=False)
    assert seen == ({4, 8, 12, 16} if block_size else {16})


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("alignment", ["same", "next"])
@pytest.mark.parametrize("settings", RULES)
def test_a_cache_that_is_always_refreshed_changes_nothing(
    cache: str, alignment: str, settings: dict[str, object]
) -> None:
    model, xt = denoiser(alignment=alignment), prompts()
    plain = decode(model, xt, block_size=4, **settings)
    assert same(decode(model, xt, block_size=4, cache=cache, refresh_every=1, **settings), plain)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_with_one_block_a_prefix_cache_is_exact_and_a_dual_one_too(cache: str) -> None:
    """There is nothing outside the block to go out of date."""
    model, xt = denoiser(), prompts()
    assert same(decode(model, xt, block_size=LENGTH, cache=cache), decode(model, xt, block_size=LENGTH))


def test_what_is_read_in_each_step() -> None:
    """Blocks of 4 in rows of 12; the second row moves on after two steps."""
    xt = torch.full((2, 12), MASK)
    steps = [[0, 0], [0, 0], [0, 4], [0, 4], [4, 4]]

    def windows(window: BlockWindow | PrefixWindow | DualWindow) -> list[list[tuple[int, int]]]:
        found = []
        for step in steps:
            start = torch.tensor(step)
            read = window(Blocks(start, start + 4))
            found.append(list(zip(read.start.tolist(), read.stop.tolist(), strict=True)))
        return found

    whole = (0, 12)
    assert windows(BlockWindow(xt)) == [
        [(0, 4), (0, 4)],
        [(0, 4), (0, 4)],
        [(0, 4), (0, 8)],  # the finished block once more, now that it is finished
        [(0, 4), (4, 8)],
        [(0, 8), (4, 8)],
    ]
    assert windows(PrefixWindow(xt)) == [
        [whole, whole],
        [(0, 12), (0, 12)],
        [(0, 12), whole],
        [(0, 12), (4, 12)],
        [whole, (4, 12)],
    ]
    assert windows(DualWindow(xt)) == [
        [whole, whole],
        [(0, 4), (0, 4)],
        [(0, 4), whole],
        [(0, 4), (4, 8)],
        [whole, (4, 8)],
    ]
    assert windows(DualWindow(xt, every=2)) == [
        [whole, whole],
        [(0, 4), (0, 4)],
        [whole, whole],
        [(0, 4), (4, 8)],
        [whole, whole],
    ]


CACHED = [
    ({"block_size": 4}, {"cache": "block", "threshold": 0.4}),
    ({"block_size": 4, "alignment": "next"}, {"cache": "block", "temperature": 1.0}),
    ({}, {"cache": "prefix", "block_size": 4, "threshold": 0.4}),
    ({"alignment": "next"}, {"cache": "dual", "block_size": 4, "refresh_every": 3, "temperature": 1.0}),
    ({}, {"block_size": 4, "reads_ahead": False, "threshold": 0.4}),
]


@pytest.mark.parametrize(("model_settings", "settings"), CACHED)
def test_a_row_does_not_depend_on_its_batch(model_settings: dict[str, object], settings: dict[str, object]) -> None:
    """Alone, in another order, beside other lengths: the same tokens, in fp64."""
    model, xt = denoiser(**model_settings), prompts()
    together = decode(model, xt, **settings)
    rows = torch.tensor([6, 2, 0, 5, 3])
    shuffled = decode(model, xt, rows, **settings)
    assert torch.equal(shuffled.tokens, together.tokens[rows])
    for row in rows.tolist():
        alone = decode(model, xt, torch.tensor([row]), **settings)
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert alone.nfe[0] == together.nfe[row]


def test_in_fp32_predictions_of_a_batch_are_those_alone_within_rounding() -> None:
    model, xt = denoiser(block_size=4).float(), prompts()
    at = (xt == MASK).flatten().nonzero().squeeze(1)
    together = model.logits(xt, at)
    for row in range(len(xt)):
        own = at // LENGTH == row
        alone = model.logits(xt[row : row + 1], at[own] % LENGTH)
        assert torch.allclose(alone, together[own], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model_settings", "settings", "message"),
    [
        ({"block_size": 4}, {"block_size": 8}, "decode.block_size=8: this model was trained in blocks of 4"),
        ({"block_size": 4}, {"block_size": 4, "cache": "dual"}, "decode.cache=dual: this model sees no later blocks"),
        ({}, {"cache": "block"}, "decode.cache=block: this model sees all positions"),
    ],
)
def test_a_cache_that_a_model_cannot_have_is_refused(
    model_settings: dict[str, object], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build_decoder(DecodeConfig(**settings), denoiser(**model_settings), TOKENS)


@pytest.mark.parametrize("model_settings", [{}, {"block_size": 4}])
def test_guidance_is_that_of_the_logits(model_settings: dict[str, object]) -> None:
    """One step: `(1 + w) log p(. | prompt) - w log p(.)` at every masked position, of whatever prompt."""
    model, xt, scale = denoiser(**model_settings), prompts()[:4], 1.5
    decoder = build_decoder(DecodeConfig(guidance=scale, steps=1, stop_early=False), model, TOKENS)
    first = next(state for number, state in enumerate(decoder.steps(xt)) if number == 1)
    at = ((xt == MASK) & (first.reveal_step == 0)).flatten().nonzero().squeeze(1)
    with torch.no_grad():
        conditional, unconditional = model.logits(xt, at), model.logits(torch.full_like(xt, MASK), at)
    mixed = ((1 + scale) * conditional - scale * unconditional).nan_to_num(-torch.inf)
    assert torch.equal(first.tokens.flatten()[at], mixed.argmax(-1))
    assert not torch.equal(first.tokens.flatten()[at], conditional.argmax(-1))
