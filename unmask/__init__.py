"""Masked diffusion language models: training with PUMA and its baselines, and decoding."""

from unmask.config import DecodeConfig, RunConfig
from unmask.decoding.build import build_decoder
from unmask.decoding.causal import CausalDecoder
from unmask.decoding.decoder import Decoder, predictor_from_logits
from unmask.decoding.sampling import Sampling
from unmask.errors import UserError
from unmask.masking.causal import NextToken
from unmask.masking.process import MaskingProcess, RowShard
from unmask.masking.puma import PumaPool
from unmask.masking.puma_variable import VariablePumaPool
from unmask.masking.random import RandomMasking
from unmask.models.denoiser import Denoiser
from unmask.reveal import CosineSteps, EntropyBound, Factor, Fixed, RevealRule, RevealState, Steps, Threshold
from unmask.training.loading import export, load
from unmask.types import Ask, CleanBatch, Decoded, MaskedBatch, Prediction, TokenSpec, TokenStats

__all__ = [
    "Ask",
    "CausalDecoder",
    "CleanBatch",
    "CosineSteps",
    "DecodeConfig",
    "Decoded",
    "Decoder",
    "Denoiser",
    "EntropyBound",
    "Factor",
    "Fixed",
    "MaskedBatch",
    "MaskingProcess",
    "NextToken",
    "Prediction",
    "PumaPool",
    "RandomMasking",
    "RevealRule",
    "RevealState",
    "RowShard",
    "RunConfig",
    "Sampling",
    "Steps",
    "Threshold",
    "TokenSpec",
    "TokenStats",
    "UserError",
    "VariablePumaPool",
    "build_decoder",
    "export",
    "load",
    "predictor_from_logits",
]
