"""The names that `import unmask` offers, gathered; `unmask/__init__.py` fetches them when one is used."""

from unmask.config.run import RunConfig
from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig
from unmask.decoding.decoder import Decoder, predictor_from_logits
from unmask.decoding.sampling import Sampling
from unmask.errors import UserError
from unmask.masking.ar import NextToken
from unmask.masking.process import MaskingProcess, RowShard
from unmask.masking.puma import PumaPool
from unmask.masking.puma_variable import VariablePumaPool
from unmask.masking.uniform import RandomMasking
from unmask.models.denoiser import Denoiser
from unmask.reveal import (
    CosineSteps,
    EntropyBound,
    ErrorBudget,
    Factor,
    Fixed,
    NumSteps,
    RevealRule,
    RevealState,
    Threshold,
)
from unmask.training.exporting import export
from unmask.training.loading import load
from unmask.types import (
    CleanBatch,
    Decoded,
    MaskedBatch,
    Prediction,
    Query,
    TokenSpec,
    TokenStats,
)

__all__ = [
    "CleanBatch",
    "CosineSteps",
    "DecodeConfig",
    "Decoded",
    "Decoder",
    "Denoiser",
    "EntropyBound",
    "ErrorBudget",
    "Factor",
    "Fixed",
    "MaskedBatch",
    "MaskingProcess",
    "NextToken",
    "NumSteps",
    "Prediction",
    "PumaPool",
    "Query",
    "RandomMasking",
    "RevealRule",
    "RevealState",
    "RowShard",
    "RunConfig",
    "Sampling",
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
