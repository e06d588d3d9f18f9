"""A masking process of which one of two ranks has a bad batch."""

import math
from dataclasses import replace

from unmask.data.stream import ExampleStream
from unmask.masking.uniform import RandomMasking
from unmask.types import MaskedBatch


class Spoiled(RandomMasking):
    """The second rank's weights of step 2 are not numbers."""

    def next_batch(self, stream: ExampleStream) -> MaskedBatch:
        batch = super().next_batch(stream)
        is_spoiled = self.step == 1 and self.shard.start > 0
        return replace(batch, weight=batch.weight * math.nan) if is_spoiled else batch
