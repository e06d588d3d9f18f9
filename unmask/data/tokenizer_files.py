"""Finds and reads tokenizers: in a folder, a `tokenizer.json`, or on the Hugging Face hub."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from unmask import formats
from unmask.errors import UserError, first_line
from unmask.paths import user_path

TOKENIZER = "tokenizer.json"
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_TEMPLATE = "chat_template.jinja"
_MAX_BYTES = 2**28
"""Most bytes of a `tokenizer.json`; the largest that are published have 40 million."""
_GAP = 4096
"""Ids that a small tokenizer may leave out."""
_VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt", "*.model", "*.tiktoken")


def load_tokenizer(source: str) -> Tokenizer:
    """Loads the tokenizer of a folder, a `tokenizer.json`, or a name on the hub such as `Qwen/Qwen2-0.5B`.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    return read_tokenizer(find_tokenizer(source), source)


def find_tokenizer(source: str) -> Path:
    """Finds the folder or file of `source` on this machine; downloads it from the hub, once.

    Raises:
        UserError: it is neither a file or folder, nor to be had from the hub.
    """
    path = user_path(source, "tokenizer ")
    if path.exists():
        return path
    import huggingface_hub  # a quarter of a second, which only this needs

    try:
        folder = huggingface_hub.snapshot_download(
            source, allow_patterns=[TOKENIZER, *SETTINGS_FILES, _TEMPLATE, *_VOCABULARIES]
        )
    except Exception as error:  # it has dozens of kinds: no such name, not logged in, no network, offline
        raise UserError(
            f"tokenizer {source}: no such file or folder, and not to be had from the Hugging Face hub: "
            f"{first_line(error)}; "
            "give a folder with tokenizer.json in it, or a name such as Qwen/Qwen2-0.5B"
        ) from error
    return Path(folder)


def read_tokenizer(path: Path, source: str = "") -> Tokenizer:
    """Reads the tokenizer of a folder or file, without its settings for padding and truncation."""
    file = path / TOKENIZER if path.is_dir() else path
    if not file.exists() and path.is_dir():
        tokenizer = _convert(path, source or str(path))
    else:
        text = formats.read_text(file, max_bytes=_MAX_BYTES)
        try:
            tokenizer = Tokenizer.from_str(text)
        except BaseException as error:  # the library raises no narrower one, and, where it panics, no `Exception`
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise UserError(f"{file}: cannot be read as a tokenizer: {str(error)[:500]}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer_size(tokenizer, str(file))
    return tokenizer


def read_prefix(path: Path) -> list[int]:
    """Returns the ids that a tokenizer puts before every text by itself, if it puts none after it.

    Raises:
        UserError: it cannot be read.
    """
    tokenizer = read_tokenizer(path)
    some, with_special = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
    before = len(with_special) - len(some)
    return with_special[:before] if with_special[before:] == some else []


def tokenizer_size(tokenizer: Tokenizer, source: str = "the tokenizer") -> int:
    """Returns one more than the largest id.

    Raises:
        UserError: it has no tokens, or ids far beyond their number, for which tables would be made.
    """
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    largest, most = max(ids, default=-1), 2 * len(ids) + _GAP
    if not 0 <= largest < most:
        raise UserError(
            f"{source}: its largest id is {largest}, of {len(ids)} tokens; ids must be from 0 to {most - 1}: take the "
            "tokenizer from where it was published"
        )
    return largest + 1


def find_end_token(path: Path) -> str | None:
    """Finds the `eos_token` in the settings beside a tokenizer; None if they name none."""
    return find_named_tokens(path).get("eos_token")


def find_named_tokens(path: Path) -> dict[str, str]:
    """Finds the texts of special tokens in the settings beside a tokenizer, by their names there, as `bos_token`."""
    folder = path if path.is_dir() else path.parent
    found: dict[str, str] = {}
    for name in reversed(SETTINGS_FILES):
        for key, token in read_settings_file(folder / name).items():
            text = token_text(token)
            if key.endswith("_token") and text is not None:
                found[key] = text
    return found


def find_chat_template(path: Path) -> str | None:
    """Finds the chat template beside a tokenizer; of several the one named `default`; None if there is none."""
    folder = path if path.is_dir() else path.parent
    if (folder / _TEMPLATE).exists():
        return formats.read_text(folder / _TEMPLATE)
    given = read_settings_file(folder / SETTINGS_FILES[0]).get("chat_template")
    for each in given if isinstance(given, list) else []:
        if isinstance(each, dict) and each.get("name") == "default":
            given = each.get("template")
    return given if isinstance(given, str) else None


def token_text(token: Any) -> str | None:
    """Returns the text of a special token, which files write as a string or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def read_settings_file(path: Path) -> dict[str, Any]:
    """Reads a JSON object; an empty one if the file is not there, or holds something else."""
    settings = formats.read_json(path) if path.exists() else {}
    return settings if isinstance(settings, dict) else {}


def _convert(folder: Path, source: str) -> Tokenizer:
    """Converts the older files that only transformers reads."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(
            f"{source}: has no {TOKENIZER}; to make one of older files, pip install 'unmask[hf]'"
        ) from error
    try:
        made = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return made.backend_tokenizer
    except Exception as error:  # whatever the files make it stumble over
        raise UserError(f"{source}: has no {TOKENIZER}, and transformers cannot make one: {error}") from error
