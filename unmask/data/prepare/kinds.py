"""Prompts with answers, and running text: what a shard of each holds, and how the rows of a store come of it."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from unmask.data.prepare import documents, finish, packing, rows
from unmask.data.prepare.finish import Block
from unmask.data.prepare.settings import Settings
from unmask.data.prepare.shards import Shard
from unmask.data.prepare.sources import Row
from unmask.data.vocabulary import Vocabulary


class Kind(NamedTuple):
    make_shard: Callable[[Sequence[Row], Vocabulary, Settings], Shard]
    blocks: Callable[[Sequence[Path], Vocabulary, Settings], Iterator[Block]]


KINDS = {"answers": Kind(rows.make_shard, finish.blocks), "text": Kind(documents.make_shard, packing.blocks)}
"""By `Dataset.kind`."""
