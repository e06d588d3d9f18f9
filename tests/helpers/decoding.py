"""Small models, prompts and decoders."""

import torch
from torch import Tensor

from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig
from unmask.models.build import build_denoiser
from unmask.models.denoiser import Denoiser
from unmask.models.transformer_config import TransformerConfig
from unmask.types import Decoded, TokenSpec

EOS, MASK, LENGTH = 6, 7, 16
TOKENS = TokenSpec(vocab_size=8, length=LENGTH, mask_id=MASK, eos_id=EOS, pad_id=EOS)


def denoiser(**settings: object) -> Denoiser:
    config = TransformerConfig(preset="tiny", **settings)
    model = build_denoiser(config, TOKENS, seed=1, dtype="float64").eval()
    for parameter in model.parameters():
        parameter.data *= 4  # predictions that differ
    return model


def prompts() -> Tensor:
    """Given first, given anywhere (to be infilled), all masked but the first, nothing masked."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, EOS, (7, LENGTH), generator=generator)
    is_masked = torch.arange(LENGTH) >= torch.tensor([3, 9, 1, 12, 16, 5, 1]).unsqueeze(1)
    is_masked[5:] = torch.rand(2, LENGTH, generator=generator) < 0.6
    is_masked[:, 0] = False
    return torch.where(is_masked, MASK, x0)


def decode(model: Denoiser, xt: Tensor, rows: Tensor | None = None, **settings: object) -> Decoded:
    decoder = build_decoder(DecodeConfig(**settings), model, TOKENS)
    return decoder.decode(xt if rows is None else xt[rows], rows)


def same(a: Decoded, b: Decoded) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in vars(a))


def partly_given(count: int, seed: int = 0) -> torch.Tensor:
    """Rows with different numbers of given tokens; the first has nothing to decode."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(7, (count, 14), generator=generator)
    num_given = 14 - torch.arange(count) % 15
    return torch.where(torch.rand(count, 14, generator=generator).argsort(1) < num_given[:, None], tokens, 7)
