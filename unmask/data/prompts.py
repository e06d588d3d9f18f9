"""What decoding starts from. Preparation and evaluation both ask here: a model meets the prompts that it learned."""

from collections.abc import Sequence

from unmask.data.vocabulary import Vocabulary


def encode_prompts(vocabulary: Vocabulary, texts: Sequence[str], separator: str) -> list[list[int]]:
    """The ids of each text without the space around it, then those of the separator.

    The two are encoded apart, as PUMA's reference implementation does: `?` and a newline, encoded together, are one
    token to Qwen, and a prompt would end otherwise after a question mark than after a full stop.
    """
    end = vocabulary.encode(separator)
    return [ids + end for ids in vocabulary.encode_batch([text.strip() for text in texts])]


def encode_prompt(vocabulary: Vocabulary, text: str, separator: str) -> list[int]:
    """One of `encode_prompts`."""
    return encode_prompts(vocabulary, [text], separator)[0]
