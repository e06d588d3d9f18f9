from itertools import product

import pytest
import torch
from torch import Tensor

from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig
from unmask.decoding.decoder import Decoder
from unmask.decoding.sampling import Sampling
from unmask.errors import UserError
from unmask.models.denoiser import Denoiser
from unmask.models.transformer import Transformer
from unmask.models.transformer_config import TransformerConfig
from unmask.types import Decoded, TokenSpec

EOS, MASK = 8, 9
TOKENS = TokenSpec(vocab_size=10, length=16, mask_id=MASK, eos_id=EOS)
SETTINGS = {
    "rotary": {},
    "learned positions": {"learned_positions": True, "rotary": False},
    "shared heads": {"num_kv_heads": 2},
    "one head for all": {"num_kv_heads": 1, "qk_norm": True, "qkv_bias": True},
    "tied head": {"tied_head": True},
}


def causal(**settings: object) -> Denoiser:
    config = TransformerConfig(
        **{"dim": 32, "ff_dim": 48, "num_layers": 3, "num_heads": 4, "causal": True, "alignment": "next"} | settings
    )
    backbone = Transformer(config, TOKENS)
    backbone.init_weights(0)
    return Denoiser(backbone, mask_id=MASK, alignment="next").double().eval()


def decoder(model: Denoiser, *, stop_early: bool = False, **settings: object) -> Decoder:
    return build_decoder(DecodeConfig(order="left_to_right", stop_early=stop_early, **settings), model, TOKENS)


def prompts(lengths: tuple[int, ...] = (3, 7, 1, 12, 15, 9)) -> Tensor:
    x0 = torch.randint(0, EOS, (len(lengths), TOKENS.length), generator=torch.Generator().manual_seed(0))
    return torch.where(torch.arange(TOKENS.length) < torch.tensor(lengths).unsqueeze(1), x0, MASK)


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cache_changes_nothing(kind: str, temperature: float) -> None:
    """The decoder without a cache reads the whole canvas again for every token."""
    model, xt = causal(**SETTINGS[kind]), prompts()
    cached = decoder(model, temperature=temperature).decode(xt)
    plain = Decoder(model.predict, MASK, order="left_to_right", sampling=Sampling(temperature)).decode(xt)
    for name in vars(plain):
        assert torch.equal(getattr(cached, name), getattr(plain, name)), name


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_its_batch(temperature: float) -> None:
    own, xt = decoder(causal(), stop_early=True, temperature=temperature), prompts()
    together = own.decode(xt)
    for row in range(len(xt)):
        alone = own.decode(xt[row : row + 1], torch.tensor([row]))
        for name in vars(alone):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[row]), name


def test_a_row_ends_where_it_says_so_and_costs_no_more() -> None:
    xt = prompts()
    free = decoder(causal(), temperature=1.5).decode(xt)
    ended = decoder(causal(), temperature=1.5, stop_early=True).decode(xt)
    has_ended = 0
    for row, given in enumerate((xt != MASK).sum(-1).tolist()):
        said = free.tokens[row, given:].tolist()
        count = said.index(EOS) + 1 if EOS in said else len(said)
        has_ended += count < len(said)
        assert ended.tokens[row, given:].tolist() == said[:count] + [EOS] * (len(said) - count)
        assert ended.nfe[row] == count
        assert ended.reveal_step[row].max() == count - 1
    assert has_ended > 1


def test_states_are_the_canvases_in_between() -> None:
    xt = prompts((2, 14))
    states: list[Decoded] = [
        Decoded(**{name: value.clone() for name, value in vars(state).items()}) for state in decoder(causal()).steps(xt)
    ]
    assert torch.equal(states[0].tokens, xt)
    assert len(states) == 15
    for step, state in enumerate(states):
        assert (state.tokens == MASK).sum(-1).tolist() == [14 - step, max(0, 2 - step)]


def test_nothing_to_do_is_done() -> None:
    xt = prompts((16, 16))
    decoded = decoder(causal(), stop_early=True).decode(xt)
    assert torch.equal(decoded.tokens, xt)
    assert decoded.nfe.tolist() == [0, 0]


def test_every_token_is_read_once() -> None:
    model, read = causal(), []
    model.backbone.embedding.register_forward_hook(lambda _, inputs, __: read.append(tuple(inputs[0].shape)))
    decoder(model).decode(prompts((3, 14)))
    assert read == [(2, 14), (2, 1), *[(1, 1)] * 11]  # the prompts, padded to the longest; then the rows that are open


@pytest.mark.parametrize("canvas", [[MASK] * 16, [1, MASK, 2] + [MASK] * 13])
def test_other_canvases_are_refused(canvas: list[int]) -> None:
    with pytest.raises(UserError, match="follows a prompt"):
        decoder(causal()).decode(torch.tensor([canvas]))


def test_what_is_sampled_follows_the_model() -> None:
    """Two tokens behind one prompt, 4,000 times: a chi-square test of all pairs against the chain rule."""
    model = causal()
    xt = torch.full((4000, 16), 1)
    xt[:, 14:] = MASK
    tokens = decoder(model, temperature=1.0).decode(xt).tokens[:, 14:]
    pairs = torch.tensor(list(product(range(9), repeat=2)))
    canvas = torch.full((81, 16), 1)
    canvas[:, 14:] = pairs
    at = (torch.arange(81).unsqueeze(1) * 16 + torch.tensor([14, 15])).flatten()
    log_p = model.logits(canvas, at).log_softmax(-1).view(81, 2, -1)
    expected = 4000 * log_p.gather(-1, pairs.unsqueeze(-1)).sum(dim=(1, 2)).exp()
    found = torch.bincount(tokens[:, 0] * 9 + tokens[:, 1], minlength=81)
    enough = expected > 5
    chi = ((found - expected)[enough] ** 2 / expected[enough]).sum().item()
    degrees = int(enough.sum())
    assert chi < degrees + 4 * (2 * degrees) ** 0.5  # four standard deviations


WRONG = [
    {"order": "prob"},
    {"tokens_per_step": 2},
    {"steps": 5},
    {"threshold": 0.9},
    {"factor": 1.0},
    {"entropy_bound": 0.1},
    {"confidence_noise": 0.5},
    {"block_size": 4},
    {"cache": "block"},
    {"guidance": 1.5},
]


@pytest.mark.parametrize("setting", WRONG)
def test_a_causal_model_has_one_order(setting: dict[str, object]) -> None:
    config = DecodeConfig(**{"order": "left_to_right"} | setting)
    with pytest.raises(UserError, match=f"decode.{next(iter(setting))}="):
        build_decoder(config, causal(), TOKENS)


def test_the_decoder_is_the_models() -> None:
    config = DecodeConfig(order="left_to_right", temperature=0.5, seed=3, top_k=2, top_p=0.9, forbid=[4, 1])
    built = build_decoder(config, causal(), TOKENS)
    assert built.eos_id == EOS
    assert built.block_size == 1
    assert built.sampling == Sampling(temperature=0.5, seed=3, top_k=2, top_p=0.9, forbidden=(1, 4))
    assert build_decoder(config, causal(causal=False), TOKENS).block_size is None
    endless = build_decoder(config.model_copy(update={"stop_early": False}), causal(), TOKENS)
    assert endless.eos_id is None


@pytest.mark.parametrize(("forbid", "why"), [([3, 10], "has 10 tokens, 0 to 9"), (list(range(9)), "no token is left")])
def test_tokens_that_cannot_be_forbidden(forbid: list[int], why: str) -> None:
    for model in (causal(), causal(causal=False)):
        with pytest.raises(UserError, match=why):
            build_decoder(DecodeConfig(order="left_to_right", forbid=forbid), model, TOKENS)
