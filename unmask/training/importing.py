"""Makes a model of this package of a Hugging Face checkpoint: its settings, tokens and weights, as in an export."""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from unmask.config.run import RunConfig
from unmask.data.tokenizer_files import read_prefix
from unmask.data.vocabulary import Vocabulary
from unmask.errors import UserError
from unmask.models.cost import count_parameters, decoding_memory
from unmask.models.hf import read_checkpoint
from unmask.models.hf_weights import read_formats, read_weights
from unmask.models.on_demand import OnDemand
from unmask.models.transformer_config import TransformerConfig
from unmask.training.hf_tokens import FoundIds, HfTokens
from unmask.types import TokenSpec

CANVAS = 512
"""Positions of a canvas, unless another number is asked for, or the model was made for fewer."""
_LENGTHS = 8  # rows of text are multiples of it


@dataclass(frozen=True)
class Statements:
    """The user's own statements on a checkpoint that does not say it itself; `length` is of the canvas."""

    mask_id: int | None = None
    mask_token: str | None = None
    block_size: int | None = None
    alignment: Literal["same", "next"] | None = None
    length: int | None = None

    @property
    def is_masked(self) -> bool:
        """True if they are of a masked diffusion model, which a checkpoint that says nothing is then."""
        return any(each is not None for each in (self.mask_id, self.mask_token, self.block_size, self.alignment))

    def as_options(self) -> list[str]:
        """Returns them as they are written on the command line."""
        given = {key: value for key, value in asdict(self).items() if value is not None}
        return [part for key, value in given.items() for part in (f"--{key.replace('_', '-')}", str(value))]


class Import:
    """A checkpoint in `folder` as a model of this package.

    A Llama or Qwen that names no mask, and of which nobody says anything, is the causal model that it was made as.

    Raises:
        UserError: it is of no family that is known, needs something that our transformer does not have, does not say
            what it must and `stated` do not, or contradicts them.
    """

    def __init__(self, folder: Path, stated: Statements | None = None) -> None:
        self.folder = folder
        self.stated = stated or Statements()
        self.checkpoint = read_checkpoint(folder)
        self._found = HfTokens(self.checkpoint)
        self.mask = self._find_mask()
        self.ends = self._found.find_ends()
        self.is_causal = self.checkpoint.alignment is None and self.mask is None and not self.stated.is_masked
        self.alignment = self._find_alignment()
        self.block_size = self._find_block_size()
        if self.mask is None and not self.is_causal:
            raise UserError(
                f"{self.checkpoint.file}: neither it nor the tokenizer names a mask; say which token it is, "
                "with --mask-token TOKEN or --mask-id N"
            )

    # --- what it is --------------------------------------------------------------------------------------------------

    def _find_mask(self) -> FoundIds | None:
        asked, token = self.stated.mask_id, self.stated.mask_token
        found = self._found.find_mask(is_masked=self.stated.is_masked)
        said = f"--mask-id {asked}" if token is None else f"--mask-token {token}"
        if token is not None:
            named = self._found.find_id(token, "--mask-token")
            if asked not in (None, named):
                raise UserError(f"--mask-id {asked}, --mask-token {token}: that token is {named}; give one of them")
            asked = named
        if asked is None:
            return found
        if found is not None and not found.is_default and found.ids[0] != asked:
            raise UserError(
                f"{said}: {self.folder / found.source} says that the mask is {found.ids[0]}; leave the option out"
            )
        return FoundIds((asked,), said)

    def _find_alignment(self) -> Literal["same", "next"]:
        own, asked = self.checkpoint.alignment, self.stated.alignment
        if self.is_causal:
            return "next"
        if own is not None and asked not in (None, own):
            raise UserError(f"--alignment {asked}: {self.checkpoint.file} is of a model with {own}; leave it out")
        found = own or asked
        if found is None:
            raise UserError(
                f"{self.checkpoint.file}: does not say where a position's prediction is read; say --alignment next (at "
                "the position before, as what was made from an autoregressive model mostly has it) or --alignment same"
            )
        return found

    def _find_block_size(self) -> int | None:
        own, asked = self.checkpoint.block_size, self.stated.block_size
        if self.checkpoint.says_block_size and asked not in (None, own):
            raise UserError(f"--block-size {asked}: {self.checkpoint.file} says {own}; leave the option out")
        return None if self.is_causal else asked or own

    @cached_property
    def original_ids(self) -> list[int | None]:
        """The row of each token: those of the tokenizer, and the mask wherever it is; None: a new row.

        A causal model gets a new mask, which nothing ever reads.

        Raises:
            UserError: the mask has no row.
        """
        ids: list[int | None] = [*range(self._found.num_ids)]
        row = None if self.mask is None else self._found.check_mask(self.mask)
        return ids if row is not None and row < len(ids) else [*ids, row]

    @cached_property
    def tokens(self) -> TokenSpec:
        """The tokens of the model.

        Raises:
            UserError: the mask or the end token is missing, or beyond the rows.
        """
        mask = None if self.mask is None else self.mask.ids[0]
        mask_id, size = self.original_ids.index(mask), len(self.original_ids)
        eos = None if self.ends is None else self.ends.ids[0]
        if eos == mask_id or (eos is not None and eos >= size):
            raise UserError(
                f"{self.folder}: the end token {eos} (from {self.ends and self.ends.source}) is the mask, or beyond "
                f"its {size} tokens; correct eos_token_id in config.json"
            )
        fingerprint = None
        if self._found.tokenizer is not None:
            fingerprint = Vocabulary.from_ids(self.folder, eos_id=eos, mask_id=mask_id).fingerprint
        return TokenSpec(
            vocab_size=size, length=self.length, mask_id=mask_id, eos_id=eos, pad_id=eos, fingerprint=fingerprint
        )

    @property
    def length(self) -> int:
        """Positions of the canvas, in whole blocks.

        Raises:
            UserError: those asked for are not.
        """
        unit, asked = math.lcm(_LENGTHS, self.block_size or 1), self.stated.length
        if asked is not None and (asked % unit or asked < unit):
            nearest = max(unit, asked // unit * unit)
            raise UserError(f"--length {asked}: must be a multiple of {unit}; use {nearest} or {nearest + unit}")
        most = min(CANVAS, self.checkpoint.max_length or CANVAS)
        return asked or max(unit, most // unit * unit)

    # --- as a run -----------------------------------------------------------------------------------------------------

    @cached_property
    def config(self) -> RunConfig:
        """Its settings, as those of a run that trained it."""
        tokens = self.tokens
        data: dict[str, Any] = {
            "length": tokens.length,
            "vocab_size": tokens.vocab_size,
            "mask_id": tokens.mask_id,
            "eos_id": tokens.eos_id,
            "fingerprint": tokens.fingerprint,
        }
        has_text = self._found.tokenizer is not None
        if has_text:
            data |= {"tokenizer": str(self.folder), "prefix": read_prefix(self.folder)}
        blocks = {"block_size": self.block_size}
        return RunConfig.from_tree(
            {
                "task": {"name": "pretrained" if has_text else "tokens"},
                "data": data,
                "model": {"causal": self.is_causal, "alignment": self.alignment, **blocks, **self.checkpoint.settings},
                "process": {"name": "ar"} if self.is_causal else {"name": "uniform", **blocks},
                "train": {"steps": 1},
                "decode": {"batch_size": 16, **self._decode},
            }
        )

    @property
    def _decode(self) -> dict[str, Any]:
        if self.is_causal:
            return {"order": "left_to_right"}
        return {} if self.block_size is None else {"block_size": self.block_size, "cache": "block"}

    def read_weights(self) -> OnDemand:
        """Reads the weights, each when it is asked for; those in bfloat16 stay so.

        Raises:
            UserError: as `hf_weights.read_weights`.
        """
        return read_weights(
            self.folder, original_ids=self.original_ids, vocab_size=self.tokens.vocab_size, keeps_bfloat16=True
        )

    @cached_property
    def formats(self) -> set[str]:
        """The number formats of its tensors, such as `BF16`."""
        return read_formats(self.folder)

    def describe(self) -> dict[str, str]:
        """Describes in words what was found; reads the heads of the weights alone."""
        config, rows = self.config.model, self.checkpoint.num_rows
        assert isinstance(config, TransformerConfig)
        seen = "those before it (causal)" if self.is_causal else "all" if self.block_size is None else "blocks"
        return {
            "family": self.checkpoint.family_name,
            "parameters": f"{count_parameters(config, self.tokens):,} ({config.num_layers} layers, width {config.dim})",
            "numbers": ", ".join(sorted(self.formats)),
            "a position sees": f"blocks of {self.block_size} up to its own" if seen == "blocks" else seen,
            "alignment": self.alignment,
            "mask": self._say(self.mask) if self.mask else "none: it is autoregressive, and gets a new one",
            "end": self._say(self.ends) if self.ends else "none",
            "head": "tied to the embedding" if config.tied_head else "a matrix of its own",
            "vocabulary": f"{self.tokens.vocab_size:,} tokens, of {rows:,} rows of the checkpoint",
            "canvas": f"{self.length} positions",
            "memory": f"about {self._memory / 2**30:.2g} GiB to decode one in bfloat16",
        }

    @property
    def _memory(self) -> int:
        config, is_narrow = self.config.model, self.formats == {"BF16"}
        assert isinstance(config, TransformerConfig)
        held, is_cached = "bfloat16" if is_narrow else "float32", self.config.decode.cache != "none" or self.is_causal
        return decoding_memory(config, self.tokens, rows=1, is_cached=is_cached, held=held).total

    def _say(self, found: FoundIds) -> str:
        names = ((i, self._found.name(i)) for i in found.ids)
        return f"{', '.join(str(i) if name is None else f'{i} {name}' for i, name in names)} (from {found.source})"
