import math

import pytest
import torch
from pydantic import ValidationError

from unmask.config import recipes
from unmask.masking.process import masked_batch
from unmask.models.attention import Attention, rotary_angles, rotate
from unmask.models.build import build_denoiser
from unmask.models.denoiser import Denoiser
from unmask.models.presets import PRESETS
from unmask.models.transformer import Transformer
from unmask.models.transformer_config import TransformerConfig
from unmask.reveal import CONFIDENCES
from unmask.types import Query, TokenSpec

TOKENS = TokenSpec(vocab_size=11, length=20, mask_id=10)
VARIANTS = [
    {"preset": "tiny"},
    {"preset": "tiny", "rotary": True, "learned_positions": False},
    {"preset": "tiny", "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "rotary": True},
    {"preset": "tiny", "num_heads": 4, "num_kv_heads": 1, "tied_head": True},
    {"preset": "tiny", "rotary": True, "rotary_layout": "reference", "learned_positions": False},
    {"preset": "tiny", "dropout": 0.3},
    {"preset": "tiny", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "qk_norm": True, "rotary": True},
]


def denoiser(seed: int = 0, **settings: object):  # type: ignore[no-untyped-def]
    return build_denoiser(TransformerConfig(**settings), TOKENS, seed=seed, dtype="float64").eval()


def hidden_states(model, xt: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Of all positions, (B, L, D)."""
    return model.backbone(xt, torch.arange(xt.numel())).unflatten(0, xt.shape)


def test_a_row_of_24576_tokens_has_a_loss() -> None:
    tokens = TokenSpec(vocab_size=5, length=24_576, mask_id=4)
    model = build_denoiser(TransformerConfig(dim=8, ff_dim=8, num_layers=1, num_heads=1), tokens)
    x0 = torch.randint(4, (1, tokens.length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.logits(torch.where(torch.arange(tokens.length) % 2 == 0, x0, 4), torch.arange(tokens.length))
    loss = torch.nn.functional.cross_entropy(logits[1::2], x0[0, 1::2], reduction="none")
    assert math.log(4) / 2 < loss[-100:].mean() < 2 * math.log(4)
    assert bool((loss > 0).all())


@pytest.mark.parametrize("settings", VARIANTS)
def test_only_what_is_asked_for_is_computed_and_it_is_the_same(settings: dict) -> None:
    """In any order, and repeatedly; the gradients too."""
    model = denoiser(**settings)
    xt, at = torch.randint(11, (3, 20)), torch.tensor([59, 3, 3, 0, 21])
    found = []
    for hidden in (model.backbone(xt, at), hidden_states(model, xt).flatten(0, 1)[at]):
        model.zero_grad()
        (hidden * torch.arange(5.0)[:, None]).sum().backward()
        found.append([hidden, *(p.grad.to_dense() for p in model.backbone.parameters() if p.grad is not None)])
    assert len(found[0]) > 10
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_what_else_a_model_has_does_not_change_the_start_of_a_parameter() -> None:
    plain = denoiser(preset="tiny").state_dict()
    for settings in ({"qkv_bias": True}, {"qk_norm": True}, {"rotary": True}, {"tied_head": True}, {"num_layers": 3}):
        other = denoiser(preset="tiny", **settings).state_dict()
        is_residual = ("attention.out.weight", "mlp.down.weight")  # scaled by the number of layers
        common = [name for name in plain if name in other and not name.endswith(is_residual)]
        assert len(common) > 10
        for name in common:
            assert torch.equal(plain[name], other[name]), name
    assert not torch.equal(plain["backbone.blocks.0.attention.q.weight"], plain["backbone.blocks.0.attention.k.weight"])


def test_rotary_products_depend_on_distance_alone() -> None:
    cos, sin = rotary_angles(50, 16, 10_000.0)
    q, k = torch.randn(16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    turned_q = rotate(q.expand(1, 1, 50, 16), cos.double(), sin.double())[0, 0]
    turned_k = rotate(k.expand(1, 1, 50, 16), cos.double(), sin.double())[0, 0]
    products = turned_q @ turned_k.T
    for distance in range(-49, 50):
        diagonal = products.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5)  # angles are kept in fp32
    assert torch.allclose(turned_q.norm(dim=-1), q.norm().expand(50))  # a rotation keeps lengths
    assert products.diagonal(0)[0] != pytest.approx(products.diagonal(1)[0].item())


def test_rotary_agrees_with_complex_rotation() -> None:
    """Channel e and e + E/2 as one complex number, turned by position * theta^(-2e/E)."""
    x = torch.randn(1, 1, 7, 8, dtype=torch.float64)
    cos, sin = rotary_angles(7, 8, 100.0)
    as_complex = torch.complex(x[..., :4], x[..., 4:])
    angle = torch.arange(7)[:, None] * 100.0 ** (-torch.arange(4) / 4)
    turned = as_complex * torch.polar(torch.ones(7, 4, dtype=torch.float64), angle.double())
    assert torch.allclose(rotate(x, cos.double(), sin.double()), torch.cat([turned.real, turned.imag], -1), atol=1e-6)


@pytest.mark.parametrize("width", [2, 6, 8])
def test_the_references_rotary_is_half_split_angles_on_neighbouring_channels(width: int) -> None:
    """Channel c turns by position * theta^(-2 (c mod E/2) / E), with its neighbour; ours has the even ones first."""
    x = torch.randn(1, 1, 9, width, dtype=torch.float64)
    cos, sin = rotary_angles(9, width, 50.0, torch.float64, layout="reference")
    found = rotate(torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1), cos, sin)[0, 0]
    for place in range(9):
        angle = [place * 50.0 ** (-2 * (c % (width // 2)) / width) for c in range(width)]
        turned = [
            x[0, 0, place, c] * math.cos(angle[c])
            + (x[0, 0, place, c - 1] if c % 2 else -x[0, 0, place, c + 1]) * math.sin(angle[c])
            for c in range(width)
        ]
        expected = torch.stack([*turned[0::2], *turned[1::2]])
        assert torch.allclose(found[place], expected, atol=1e-5)  # its angles are fp32


def test_grouped_heads_are_heads_that_share_keys_and_values() -> None:
    grouped = Attention(16, 4, 2, qkv_bias=True, dropout=0.0).double()
    full = Attention(16, 4, 4, qkv_bias=True, dropout=0.0).double()
    full.q.load_state_dict(grouped.q.state_dict())
    full.out.load_state_dict(grouped.out.state_dict())
    for wide, narrow in ((full.k, grouped.k), (full.v, grouped.v)):
        wide.weight.data = narrow.weight.data.view(2, 4, 16).repeat_interleave(2, 0).reshape(16, 16)
        wide.bias.data = narrow.bias.data.view(2, 4).repeat_interleave(2, 0).reshape(16)
    x, angles = torch.randn(2, 6, 16, dtype=torch.float64), tuple(a.double() for a in rotary_angles(6, 4, 1e4))
    assert torch.allclose(full(x, angles), grouped(x, angles))


def test_attention_is_the_plain_formula() -> None:
    attention = Attention(8, 2, 2, qkv_bias=False, dropout=0.0).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    heads = [layer(x).view(3, 5, 2, 4).transpose(1, 2) for layer in (attention.q, attention.k, attention.v)]
    mixed = (heads[0] @ heads[1].mT / 2).softmax(-1) @ heads[2]
    assert torch.allclose(attention(x, None), attention.out(mixed.transpose(1, 2).reshape(3, 5, 8)))


def test_normalised_queries_and_keys_forget_their_scale() -> None:
    """With `qk_norm`, what the weights of q and k are multiplied by changes nothing; without it, it does."""
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    for eps, is_equal in ((1e-12, True), (None, False)):
        attention = Attention(8, 2, 1, qkv_bias=False, dropout=0.0, head_dim=6, qk_norm_eps=eps).double()
        before = attention(x, None)
        for layer in (attention.q, attention.k):
            layer.weight.data *= 3
        assert torch.allclose(attention(x, None), before, rtol=1e-9) is is_equal  # eps is 1e-12 of a square of about 1


@pytest.mark.filterwarnings("error")
def test_norms_of_queries_and_keys_run_under_autocast() -> None:
    attention = Attention(8, 2, 1, qkv_bias=False, dropout=0.0, qk_norm_eps=1e-6)
    x = torch.randn(3, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = attention(x, None)
    assert torch.allclose(rounded.float(), attention(x, None), atol=3e-2)  # values below 1; bfloat16 has 8 bits


@pytest.mark.parametrize("settings", VARIANTS)
def test_every_position_sees_every_other(settings: dict) -> None:
    model = denoiser(**settings)
    xt = torch.randint(11, (1, 20))
    base = hidden_states(model, xt)
    for position in (0, 19):
        other = xt.clone()
        other[0, position] = (other[0, position] + 1) % 11
        assert ((hidden_states(model, other) - base).abs().amax(-1) > 0).all()


@pytest.mark.parametrize("settings", VARIANTS)
def test_positions_matter(settings: dict) -> None:
    model = denoiser(**settings)
    hidden = hidden_states(model, torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]))
    swapped = hidden_states(model, torch.tensor([[2, 1, 3, 4, 5, 6, 7, 8, 9, 10]]))
    assert not torch.allclose(hidden[0, 5], swapped[0, 5])


@pytest.mark.parametrize("settings", VARIANTS)
def test_forward_and_predict_agree(settings: dict) -> None:
    """The confidence that trains the pool is the one that decodes."""
    model = denoiser(**settings)
    x0 = torch.randint(10, (4, 20))
    xt = torch.where(torch.rand(4, 20) < 0.5, 10, x0)
    batch = masked_batch(x0, xt, 10, torch.ones(4))
    count = int((xt == 10).sum())
    log_probs = model.logits(xt, batch.scored[:count]).log_softmax(-1)
    for confidence in CONFIDENCES:
        model.confidence = confidence
        stats, answer = model(batch), model.predict(xt, batch.scored[:count], Query(confidence=confidence))
        for found in (stats.confidence[:count], answer.confidence):
            assert torch.allclose(found, CONFIDENCES[confidence](log_probs), rtol=1e-12, atol=1e-12)
        assert torch.allclose(stats.top1[:count], answer.top1, rtol=1e-12)
        assert torch.equal(answer.values, log_probs.argmax(-1))
        assert torch.allclose(stats.nll[:count], -log_probs.gather(1, batch.gather(x0)[:count, None]).squeeze(1))


@pytest.mark.parametrize("settings", VARIANTS)
def test_the_mask_token_has_no_probability(settings: dict) -> None:
    logits = denoiser(**settings).logits(torch.full((2, 20), 10), torch.arange(40))
    assert (logits[:, 10] == -torch.inf).all()
    assert logits[:, :10].isfinite().all()


def test_weights_depend_on_the_seed_alone() -> None:
    one, same, other = denoiser(3, preset="tiny"), denoiser(3, preset="tiny"), denoiser(4, preset="tiny")
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert "norm" in name or not torch.equal(a, c), name


def test_weights_start_at_the_scale_of_their_inputs() -> None:
    model = denoiser(preset="sudoku-1m")
    block = model.backbone.blocks[0]
    expected = {
        model.backbone.embedding.weight: 128**-0.5,
        block.attention.q.weight: 128**-0.5,
        block.attention.out.weight: (128 * 12) ** -0.5,
        block.mlp.down.weight: (384 * 12) ** -0.5,
    }
    for weight, std in expected.items():
        assert weight.std().item() == pytest.approx(std, rel=0.05)


def test_the_first_embeddings_alone_are_as_large_as_asked() -> None:
    plain = denoiser(preset="sudoku-1m").state_dict()
    large = denoiser(preset="sudoku-1m", embedding_std=1.0).state_dict()
    for name, weight in large.items():
        expected = plain[name] * 128**0.5 if name.endswith(("embedding.weight", "positions.weight")) else plain[name]
        torch.testing.assert_close(weight, expected)


def test_blocks_that_start_at_zero_add_nothing() -> None:
    plain, zero = denoiser(preset="tiny").backbone, denoiser(preset="tiny", init="zero").backbone
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert all(torch.equal(block(x, None), x) for block in zero.blocks)
    assert not any(torch.equal(block(x, None), x) for block in plain.blocks)
    differing = [name for name, weight in zero.named_parameters() if not torch.equal(weight, plain.get_parameter(name))]
    assert {name.split(".", 2)[2] for name in differing} == {"attention.out.weight", "mlp.down.weight"}


def test_the_reference_start_is_that_of_pytorchs_layers() -> None:
    own = {"preset": "sudoku-6m", "num_layers": 1, "qkv_bias": True, "out_bias": True, "learned_positions": True}
    found = denoiser(**own, init="reference").backbone
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = Transformer(found.config, TOKENS).double()  # as PyTorch makes it
    reference = dict(expected.named_parameters())
    for name, weight in found.named_parameters():
        std = reference[name].std().item()
        assert weight.std().item() == pytest.approx(std, rel=0.02 if weight.ndim > 1 else 0.2, abs=1e-9), name
        assert weight.abs().max().item() == pytest.approx(reference[name].abs().max().item(), rel=0.35), name
    for name in ("q", "k", "v", "out"):
        assert reference[f"blocks.0.attention.{name}.bias"].abs().max() > 0
    again = denoiser(**own, init="reference", embedding_std=0.5).backbone
    torch.testing.assert_close(2 * again.embedding.weight, found.embedding.weight)


@pytest.mark.parametrize("recipe", ["sudoku/paper_puma", "sudoku/paper_uniform", "tinygsm/uniform", "tinygsm/ar"])
def test_the_papers_recipes_start_as_its_code_does(recipe: str) -> None:
    data = "data={vocab_size: 50, mask_id: 49, eos_id: 48, length: 24}" if "tinygsm" in recipe else "data.puzzles=2"
    model = recipes.load(recipe, [data]).model
    assert (model.init, model.qkv_bias, model.out_bias, model.embedding_std) == ("reference", True, True, None)


def test_the_small_recipes_keep_our_own_start() -> None:
    for recipe in (name for name in recipes.names() if name.startswith("tinygsm/") and name.endswith("_small")):
        model = recipes.load(recipe, ["data={vocab_size: 50, mask_id: 49, eos_id: 48, length: 24}"]).model
        assert (model.init, model.out_bias) == ("scaled", False), recipe


def test_a_tied_head_is_the_embedding() -> None:
    model = denoiser(preset="tiny", tied_head=True)
    assert model.backbone.head_weight is model.backbone.embedding.weight
    assert not any("head" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("preset", "vocab_size", "length", "size"), [("sudoku-6m", 11, 162, 6.83e6), ("sudoku-42m", 28, 243, 42.5e6)]
)
def test_the_papers_models_have_their_sizes(preset: str, vocab_size: int, length: int, size: float) -> None:
    with torch.device("meta"):
        model = Transformer(
            TransformerConfig(preset=preset), TokenSpec(vocab_size=vocab_size, length=length, mask_id=vocab_size - 1)
        )
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(size, rel=0.001)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "tinny"}, "did you mean tiny"),
        ({"preset": "tiny", "num_heads": 3}, "does not divide model.dim"),
        ({"preset": "tiny", "num_heads": 4, "head_dim": 5, "rotary": True}, "not 5; change head_dim"),
        ({"preset": "tiny", "num_heads": 4, "num_kv_heads": 3}, "does not divide model.num_heads"),
        ({"preset": "tiny", "rotary": False, "learned_positions": False}, "would not know its positions"),
        ({"preset": "tiny", "attention": "flex", "dropout": 0.1}, "flex has no dropout"),
        ({}, "give model.preset"),
        ({"dim": 4}, "or model.ff_dim, model.num_layers, model.num_heads"),
    ],
)
def test_wrong_sizes_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TransformerConfig(**settings)


def test_given_keys_win_over_the_preset() -> None:
    assert TransformerConfig(preset="tiny", dim=64).dim == 64
    assert all(TransformerConfig(preset=name).preset == name for name in PRESETS)


def test_a_float64_model_turns_by_float64_angles() -> None:
    """However it came to be one; and fp32 models by the same angles, rounded once."""
    config = TransformerConfig(dim=16, ff_dim=16, num_layers=1, num_heads=2, rotary=True, learned_positions=False)
    tokens = TokenSpec(vocab_size=5, length=50, mask_id=4)
    place = torch.arange(50, dtype=torch.float64)
    angle = torch.outer(place, config.rope_theta ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8))
    plain = Transformer(config, tokens)
    assert torch.equal(plain.cos, angle.cos().float())
    assert torch.equal(plain.sin, angle.sin().float())
    converted = Denoiser(Transformer(config, tokens), mask_id=4).use_dtype("float64").backbone
    for model in (converted, Transformer(config, tokens).double()):
        assert torch.equal(model.cos, angle.cos())
        assert torch.equal(model.sin, angle.sin())
        assert torch.equal(model.float().sin, plain.sin)
