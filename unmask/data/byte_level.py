"""Text as its bytes: a vocabulary that needs no download, and knows every text."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from unmask.data.words import byte_symbols

BYTES = "bytes"
"""What stands for this tokenizer where the name of one is asked for."""
END_TOKEN = "<|end|>"
VOCAB_SIZE, EOS_ID, MASK_ID = 258, 256, 257
"""The ids of the 256 bytes are the bytes themselves; then come the end of a document, and the mask."""


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE without merges, and the end token."""
    tokenizer = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(byte_symbols())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_TOKEN, normalized=False)])
    return tokenizer


class Bytes:
    """The ids of a text under `byte_tokenizer`, without its objects for each token.

    Of `END_TOKEN`, standing in a text by name, these are the bytes: every text can be trained on.
    """

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Bytes | None":
        """The short way of `tokenizer`, if that is of bytes."""
        return cls() if tokenizer.to_str() == byte_tokenizer().to_str() else None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())
