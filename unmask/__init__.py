"""Masked diffusion language models: training with PUMA and its baselines, and decoding."""

from unmask.config import RunConfig as RunConfig
from unmask.decoding.causal import CausalDecoder as CausalDecoder
from unmask.decoding.decoder import Decoder as Decoder
from unmask.decoding.decoder import predictor_from_logits as predictor_from_logits
from unmask.errors import UserError as UserError
from unmask.masking.causal import NextToken as NextToken
from unmask.masking.process import MaskingProcess as MaskingProcess
from unmask.masking.process import RowShard as RowShard
from unmask.masking.puma import PumaPool as PumaPool
from unmask.masking.puma_variable import VariablePumaPool as VariablePumaPool
from unmask.masking.random import RandomMasking as RandomMasking
from unmask.models.denoiser import Denoiser as Denoiser
from unmask.reveal import Fixed as Fixed
from unmask.reveal import Steps as Steps
from unmask.training.loading import export as export
from unmask.training.loading import load as load
from unmask.types import Ask as Ask
from unmask.types import CleanBatch as CleanBatch
from unmask.types import Decoded as Decoded
from unmask.types import MaskedBatch as MaskedBatch
from unmask.types import Prediction as Prediction
from unmask.types import TokenSpec as TokenSpec
from unmask.types import TokenStats as TokenStats
