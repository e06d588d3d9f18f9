"""A Hugging Face tokenizer and the ids that a model sees.

The model's ids are the tokenizer's, or, where a vocabulary keeps only the ids that its data uses, their places among
the kept ones. The mask is a special token that the tokenizer has, or one more id after the others. The vocabulary of
bytes needs no download, and encodes every text.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Annotated

from pydantic import Field
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from unmask import files, formats
from unmask.data.tokenizer_files import TOKENIZER, find_end_token, find_tokenizer, read_tokenizer, tokenizer_size
from unmask.data.tokenizer_files import load_tokenizer as load_tokenizer
from unmask.data.words import WordEncoder, byte_symbols
from unmask.errors import UserError

BYTES = "bytes"
"""Name of the tokenizer of bytes."""
END_TOKEN = "<|end|>"
VOCAB_SIZE, EOS_ID, MASK_ID = 258, 256, 257
"""The ids of the 256 bytes are the bytes themselves; then come the end of a document, and the mask."""


def byte_tokenizer() -> Tokenizer:
    """Makes a byte-level BPE tokenizer without merges, with the end token."""
    tokenizer = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(byte_symbols())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_TOKEN, normalized=False)])
    return tokenizer


class ByteEncoder:
    """An encoder with the ids of `byte_tokenizer`, without its objects for each token.

    `END_TOKEN`, standing in a text by name, is encoded as its bytes: every text can be trained on.
    """

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer) -> "ByteEncoder | None":
        """Makes the encoder of `tokenizer`, if that is of bytes; else None."""
        return cls() if tokenizer.to_str() == byte_tokenizer().to_str() else None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


VOCABULARY = "vocabulary.json"
_Id = Annotated[int, Field(ge=0, lt=2**31)]


@dataclass(frozen=True)
class _Saved:
    """The content of `vocabulary.json`."""

    eos_id: _Id
    mask_id: _Id
    vocab_size: _Id
    fingerprint: str
    kept: list[_Id] | None = None


class Vocabulary:
    """A vocabulary: it encodes text as the model's ids, and decodes them.

    Args:
        tokenizer: special tokens are not added to what it encodes.
        eos: the tokenizer's id of the end token.
        mask: the tokenizer's id of the mask; None for a new one.
        kept: the tokenizer's ids that the model knows, ascending, `eos` and `mask` among them; None for all.
    """

    def __init__(
        self, tokenizer: Tokenizer, eos: int, mask: int | None = None, kept: Sequence[int] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.kept = None if kept is None else list(kept)
        known = range(tokenizer_size(tokenizer)) if self.kept is None else self.kept
        self.original_ids: list[int | None] = [*known] if mask is not None else [*known, None]
        """The tokenizer's id of each of the model's; None for a mask that the tokenizer does not have."""
        self.vocab_size = len(self.original_ids)
        self.eos_id, self.mask_id = self.original_ids.index(eos), self.original_ids.index(mask)
        self._model_ids = None if self.kept is None else {original: i for i, original in enumerate(self.kept)}
        self._fast_encoder = ByteEncoder.for_tokenizer(tokenizer) or WordEncoder.for_tokenizer(tokenizer)

    @classmethod
    def from_source(cls, source: str, eos_token: str | None = None, mask_token: str | None = None) -> "Vocabulary":
        """Makes the vocabulary of all ids of the tokenizer `source` (`load_tokenizer`; `bytes`: text is its bytes).

        Args:
            eos_token: the end token (default: the one that `source` names).
            mask_token: a token of the tokenizer (default: a new one).

        Raises:
            UserError: there is no such tokenizer or token, or no end token.
        """
        if source == BYTES:
            if eos_token or mask_token:
                raise UserError(f"{source}: has its own end and mask; leave out --eos and --mask-token")
            return cls.of_bytes()
        path = find_tokenizer(source)
        tokenizer = read_tokenizer(path, source)
        eos_token = eos_token or find_end_token(path)
        if eos_token is None:
            raise UserError(
                f"{source}: tokenizer_config.json names no eos_token; say with --eos TOKEN what ends an answer"
            )
        eos = _find_id(tokenizer, eos_token, source, "--eos", "name one that it has")
        if mask_token is None:
            return cls(tokenizer, eos)
        mask = _find_id(tokenizer, mask_token, source, "--mask-token", "leave it out, and a new one is added")
        if mask == eos:
            raise UserError(f"--mask-token {mask_token}: is the end token too; name another one")
        return cls(tokenizer, eos, mask)

    @classmethod
    def from_ids(cls, folder: Path, *, eos_id: int | None, mask_id: int) -> "Vocabulary":
        """Makes the vocabulary of all ids of the tokenizer in `folder`, and of a mask that may come after them.

        Raises:
            UserError: there is no tokenizer, or the end token is none of its own.
        """
        tokenizer = read_tokenizer(folder)
        size = tokenizer_size(tokenizer)
        if eos_id is None:
            raise UserError(
                f"{folder}: nothing names an end token; write one of its tokenizer's as eos_token into "
                "tokenizer_config.json, or as eos_token_id into config.json"
            )
        if eos_id >= size:
            raise UserError(f"{folder}: its tokenizer has {size} ids, and the end token {eos_id} is none of them")
        return cls(tokenizer, eos_id, mask_id if mask_id < size else None)

    @classmethod
    def of_bytes(cls) -> "Vocabulary":
        """Makes the vocabulary of the 256 bytes, an end token and a mask."""
        return cls(byte_tokenizer(), EOS_ID)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer and the meaning of each id."""
        parts = [json.loads(self.tokenizer.to_str()), self.eos_id, self.mask_id, self.kept]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Encodes `text` as `encode_batch` does."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes each text, without special tokens around it.

        A token that is not kept becomes the tokens of its bytes, or the unknown token where the tokenizer is not
        byte-level. A token that stands in the text by name, an end token too, is that token.

        Raises:
            UserError: a token is not kept, and nothing can take its place.
        """
        found = [self._fast_encoder.encode(text) if self._fast_encoder else None for text in texts]
        return self._encode_rest(texts, found)

    def encode_with_ends(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes each text as `encode_batch` does, but end tokens by name are end tokens with every tokenizer.

        In the vocabulary of bytes such a name is else as any other text.
        """
        return self._encode_rest(texts, [None] * len(texts)) if self._is_of_bytes else self.encode_batch(texts)

    @property
    def _is_of_bytes(self) -> bool:
        return isinstance(self._fast_encoder, ByteEncoder)

    def _encode_rest(self, texts: Sequence[str], found: list[list[int] | None]) -> list[list[int]]:
        rest = [i for i, ids in enumerate(found) if ids is None]
        encodings = self.tokenizer.encode_batch_fast([texts[i] for i in rest], add_special_tokens=False)
        slow = dict(zip(rest, (encoding.ids for encoding in encodings), strict=True))
        return [self._to_model(slow[i] if ids is None else ids) for i, ids in enumerate(found)]

    def decode(self, ids: Sequence[int], mask_text: str | None = None) -> str:
        """Decodes the model's `ids`, special tokens by name; masks are left out, or each shown as `mask_text`."""
        if mask_text is None:
            return self._decode(i for i in ids if i != self.mask_id)
        runs = groupby(ids, key=lambda i: i == self.mask_id)
        return "".join(mask_text * len(list(run)) if is_mask else self._decode(run) for is_mask, run in runs)

    def num_bytes(self, ids: Sequence[int]) -> int:
        """Counts the bytes of the text of the model's `ids`, without the end token and the mask.

        Exact, also where a row ends within a character, if the tokenizer is byte-level; else those of the decoded text.
        """
        text = [i for i in ids if i not in (self.eos_id, self.mask_id)]
        if self._bytes_of_ids is not None:
            return sum(self._bytes_of_ids[i] for i in text)
        return len(self.decode(text).encode())

    def original(self, ids: Iterable[int]) -> list[int | None]:
        """Returns the tokenizer's ids of the model's `ids`; None for a mask that it does not have."""
        return [self.original_ids[i] for i in ids]

    def name(self, token: int) -> str:
        """Returns the tokenizer's name of one of the model's ids."""
        original = self.original_ids[token]
        return "a new mask" if original is None else str(self.tokenizer.id_to_token(original))

    def restrict_to(self, used: Iterable[int]) -> "Vocabulary":
        """Makes the vocabulary of the tokenizer's ids `used` and those that must not be missing.

        These are the end token, the mask, and the tokens that replace unknown ones: all bytes, or the unknown token.
        Call it on the vocabulary of all ids.
        """
        eos, mask = self.original([self.eos_id, self.mask_id])
        assert eos is not None
        always = {eos, mask, self._unknown, *(self._byte_ids or [])}
        return Vocabulary(self.tokenizer, eos, mask, sorted({*used, *(i for i in always if i is not None)}))

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json` and `vocabulary.json` into `folder`."""
        files.write(folder / TOKENIZER, self.tokenizer.to_str())
        meaning = {"eos_id": self.eos_id, "mask_id": self.mask_id, "vocab_size": self.vocab_size, "kept": self.kept}
        files.write(folder / VOCABULARY, json.dumps(meaning | {"fingerprint": self.fingerprint}) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Vocabulary":
        """Loads the files that `save` wrote into `folder`.

        Raises:
            UserError: a file is missing or damaged, or the two do not belong together.
        """
        path = folder / VOCABULARY
        tokenizer = read_tokenizer(folder / TOKENIZER)
        saved = formats.read_json(path, _Saved)
        try:
            known = saved.kept if saved.kept is not None else range(tokenizer_size(tokenizer))
            masks = dict(enumerate(known)) | {len(known): None}
            vocabulary = cls(tokenizer, known[saved.eos_id], masks[saved.mask_id], saved.kept)
            is_same = (vocabulary.fingerprint, vocabulary.vocab_size) == (saved.fingerprint, saved.vocab_size)
        except (LookupError, ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot be read: {error!r}; `unmask prepare` makes it") from error
        if not is_same:
            raise UserError(f"{path}: is not of the {TOKENIZER} beside it, or was changed; prepare the data again")
        return vocabulary

    @cached_property
    def _byte_ids(self) -> list[int] | None:
        """The tokenizer's id of each single byte, if it is byte-level and has them all."""
        if not isinstance(self.tokenizer.decoder, decoders.ByteLevel):
            return None
        ids = [self.tokenizer.token_to_id(symbol) for symbol in byte_symbols()]
        return [i for i in ids if i is not None] if None not in ids else None

    @cached_property
    def _bytes_of_symbols(self) -> dict[str, int]:
        return {symbol: byte for byte, symbol in enumerate(byte_symbols())}

    @cached_property
    def _bytes_of_ids(self) -> list[int] | None:
        """Number of bytes that each of the model's ids stands for, if the tokenizer is byte-level."""
        if self._byte_ids is None:
            return None
        added = self.tokenizer.get_added_tokens_decoder()
        names = [self.name(i) for i in range(self.vocab_size)]
        return [
            len(name.encode() if original in added else name)
            for name, original in zip(names, self.original_ids, strict=True)
        ]

    @cached_property
    def unknown_id(self) -> int | None:
        """The model's id of the unknown token; None where the tokenizer has none."""
        unknown = self._unknown
        return self.original_ids.index(unknown) if unknown is not None and unknown in self.original_ids else None

    @property
    def _unknown(self) -> int | None:
        unknown = getattr(self.tokenizer.model, "unk_token", None)
        return None if unknown is None else self.tokenizer.token_to_id(unknown)

    def _to_model(self, ids: list[int]) -> list[int]:
        if self._model_ids is None:
            return ids
        try:
            return [self._model_ids[i] for i in ids]
        except KeyError:
            kept = self._model_ids
            return [kept[part] for i in ids for part in ([i] if i in kept else self._replace(i))]

    def _replace(self, original: int) -> list[int]:
        """Returns the tokenizer's ids that replace a token that is not kept."""
        token = self.tokenizer.id_to_token(original)
        assert token is not None
        if self._byte_ids is not None:
            is_added = original in self.tokenizer.get_added_tokens_decoder()
            content = token.encode() if is_added else bytes(self._bytes_of_symbols[symbol] for symbol in token)
            return [self._byte_ids[byte] for byte in content]
        if self._unknown is None:
            raise UserError(
                f"token {token!r} is not in the vocabulary, and the tokenizer has neither bytes nor an unknown token "
                "for it; prepare with --vocab full"
            )
        return [self._unknown]

    def _decode(self, ids: Iterable[int]) -> str:
        originals = [i for i in self.original(ids) if i is not None]
        return self.tokenizer.decode(originals, skip_special_tokens=False)


def _find_id(tokenizer: Tokenizer, token: str, source: str, option: str, fix: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise UserError(f"{option} {token}: {source} has no such token; {fix}")
    return found
