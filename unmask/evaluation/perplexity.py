"""The likelihood of running text in the units of language models."""

import math
from dataclasses import dataclass

from unmask.tasks.task import Extent


@dataclass(frozen=True)
class TextLikelihood:
    """Bounds, as the NELBO is one; exact for a causal model."""

    ppl: float
    """exp of the nats per token of text, a document's end token among them and its padding not."""
    bits_per_byte: float
    """Of the text, whatever the tokenizer."""
    rows: str
    """As `Extent.rows`."""

    @staticmethod
    def of(nelbo: float, num_maskable: int, extent: Extent) -> "TextLikelihood":
        """From nats per maskable token: `nelbo x num_maskable` is what all of the text costs, its padding too."""
        nats = nelbo * num_maskable
        return TextLikelihood(
            ppl=math.exp(min(700.0, nats / extent.tokens)),  # what no float holds is of a model that has diverged
            bits_per_byte=nats / (math.log(2) * max(1, extent.bytes)),
            rows=extent.rows,
        )
