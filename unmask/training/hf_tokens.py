"""Finds the special tokens of a Hugging Face checkpoint: its mask, and what ends a text; and which file says so."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from unmask.data.tokenizer_files import (
    SETTINGS_FILES,
    TOKENIZER,
    find_end_token,
    read_settings_file,
    read_tokenizer,
    token_text,
    tokenizer_size,
)
from unmask.errors import UserError
from unmask.models.hf import HfCheckpoint
from unmask.progress import warn
from unmask.types import TokenSpec

_OLDER = ("tokenizer.model", "vocab.json", "merges.txt")
_NAMED = ("<|mask|>", "<|MASK|>", "|<MASK>|", "<|mdm_mask|>", "<MASK>", "[MASK]", "<mask>", "<M>")
"""Names of masks, which are taken for one where a special token of the tokenizer has them."""


@dataclass(frozen=True)
class FoundIds:
    """Ids, and where they were found."""

    ids: tuple[int, ...]
    source: str
    """The name of a file, or an option."""
    is_default: bool = False
    """True if nothing says so, but it is what models of the family have."""


class HfTokens:
    """The tokenizer and special tokens of a checkpoint in `folder`."""

    def __init__(self, checkpoint: HfCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.folder = checkpoint.file.parent

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None where the folder has none."""
        if not any((self.folder / name).exists() for name in (TOKENIZER, *_OLDER)):
            return None
        return read_tokenizer(self.folder)

    @property
    def num_ids(self) -> int:
        """One more than the tokenizer's largest id; the rows of the checkpoint where it has none."""
        return self.checkpoint.num_rows if self.tokenizer is None else tokenizer_size(self.tokenizer)

    def name(self, token: int) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.id_to_token(token)

    def find_id(self, token: str, where: str) -> int:
        """Returns the id of a token that a user or a file names.

        Raises:
            UserError: there is no such token.
        """
        found = None if self.tokenizer is None else self.tokenizer.token_to_id(token)
        if found is None:
            raise UserError(f"{where}: {self.folder}: its tokenizer has no token {token!r}; name one that it has")
        return found

    def find_mask(self, *, is_masked: bool = False) -> FoundIds | None:
        """Finds the mask: in `config.json`, `generation_config.json`, the tokenizer, or as the family's default.

        A causal model's tokenizer may have a mask token that the model was never trained with, so it is not asked,
        unless the model `is_masked` all the same, as only a user knows.
        """
        checkpoint = self.checkpoint
        if checkpoint.mask_id is not None:
            return FoundIds((checkpoint.mask_id,), "config.json")
        generation = self._generation.get("mask_token_id")
        if type(generation) is int:
            return FoundIds((generation,), "generation_config.json")
        if checkpoint.alignment is None and not is_masked:
            return None
        for file in SETTINGS_FILES:
            token = token_text(read_settings_file(self.folder / file).get("mask_token"))
            if token is not None and self.tokenizer is not None:
                return FoundIds((self.find_id(token, str(self.folder / file)),), file)
        special = {} if self.tokenizer is None else self.tokenizer.get_added_tokens_decoder()
        named = [i for i, token in special.items() if token.content in _NAMED]
        if checkpoint.family.mask_id is None and len(named) == 1:
            return FoundIds((named[0],), TOKENIZER)
        return None if checkpoint.family.mask_id is None else FoundIds((checkpoint.family.mask_id,), "its family", True)

    def find_ends(self) -> FoundIds | None:
        """Finds the end tokens, the first of which ends an answer; None where nothing names one."""
        given = self._generation.get("eos_token_id")
        listed = given if isinstance(given, list) else [given]
        if ids := tuple(i for i in listed if type(i) is int and i >= 0):
            return FoundIds(ids, "generation_config.json")
        if self.checkpoint.eos_ids:
            return FoundIds(self.checkpoint.eos_ids, "config.json")
        token = find_end_token(self.folder)
        if token is not None and self.tokenizer is not None:
            return FoundIds((self.find_id(token, f"{self.folder}: eos_token"),), "tokenizer_config.json")
        family = self.checkpoint.family.eos_ids
        return FoundIds(family, "its family", True) if family and family[0] < self.num_ids else None

    def check_mask(self, found: FoundIds) -> int:
        """Returns the mask, which has a row and is no ordinary token.

        Raises:
            UserError: it has no row.
        """
        mask, rows = found.ids[0], self.checkpoint.num_rows
        if not 0 <= mask < rows:
            raise UserError(
                f"{self.checkpoint.file}: mask id {mask} (from {found.source}) lies beyond the {rows} rows of the "
                f"embedding, 0 to {rows - 1}; name the token that it was trained with (--mask-id, --mask-token), "
                "or resize the embedding to hold it, as model.resize_token_embeddings does"
            )
        special = {} if self.tokenizer is None else self.tokenizer.get_added_tokens_decoder()
        if (name := self.name(mask)) is not None and mask not in special:
            warn(
                f"{self.folder}: the mask, {mask} (from {found.source}), is {name!r}, an ordinary token: text "
                "that holds it is refused, and no answer can"
            )
        return mask

    @cached_property
    def _generation(self) -> dict[str, Any]:
        return read_settings_file(self.folder / "generation_config.json")


def with_own_mask(
    checkpoint: HfCheckpoint, original_ids: Sequence[int | None] | None, tokens: TokenSpec
) -> list[int | None] | None:
    """Returns the checkpoint's id of each of a task's tokens. A new mask is the one that it was trained with.

    Args:
        checkpoint: what the task's model starts from.
        original_ids: the tokenizer's id of each token, None for a new one; None: ids are the checkpoint's.
        tokens: the task's.

    Raises:
        UserError: the task's mask is another token than the checkpoint's, which may stand for something else.
    """
    found = HfTokens(checkpoint).find_mask()
    ids: list[int | None] = [*range(tokens.vocab_size)] if original_ids is None else [*original_ids]
    if found is None or found.ids[0] >= checkpoint.num_rows:  # the start of a new mask is the mean of all rows
        return None if original_ids is None else ids
    own, asked = found.ids[0], ids[tokens.mask_id]
    if asked is not None and asked != own:
        raise UserError(
            f"train.init={checkpoint.file.parent}: its mask is {own} (from {found.source}), that of the data is its "
            f"token {asked}; prepare the data with its mask (--mask-token); without one, a new mask is it"
        )
    used = [token for token, each in enumerate(ids) if each == own and token != tokens.mask_id]
    if used:
        raise UserError(
            f"train.init={checkpoint.file.parent}: its mask, {own} (from {found.source}), is token {used[0]} of the "
            "data, which may hold it; prepare them with --mask-token, and it is the mask"
        )
    ids[tokens.mask_id] = own
    return ids
