"""The likelihood of text under a causal language model of Hugging Face's, read from a folder.

Dimensions: b texts of a batch, l tokens of the longest.
"""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from unmask import formats, noise, paths
from unmask.errors import UserError, check_finite, first_line
from unmask.models import hf_weights

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TOKENS_AT_ONCE = 4096
"""Tokens of a batch: their logits over a large vocabulary take a GB."""


class Passage(NamedTuple):
    """A text, and the text given before it."""

    text: str
    given: str = ""


class Scored(NamedTuple):
    """The cost of a passage's own text, as far as it fits the model's context."""

    nll: float
    """Nats, of all its tokens."""
    tokens: int
    is_cut: bool
    unknown: int
    """Tokens that the tokenizer does not know."""


class Scorer:
    """A causal model and its tokenizer.

    A passage is `[start, given, text]`, `start` being the token that texts begin with (that of their end where there is
    none): then the first token has a likelihood too. What does not fit the model's context is left out, at the end.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.start = _start(model.config, tokenizer)
        self.context: int | None = getattr(model.config, "max_position_embeddings", None)

    @classmethod
    def load(cls, folder: str, device: torch.device, option: str = "") -> "Scorer":
        """Loads both from `folder` alone: nothing is downloaded, no code in it is run, and no pickle is read.

        Args:
            option: the option or setting that named the folder, for messages.

        Raises:
            UserError: transformers is not there, or the folder does not hold a causal model and its tokenizer.
        """
        where = f"{option}{folder}"
        path = paths.user_path(folder, option)
        if not (path / "config.json").exists():
            raise UserError(
                f"{where}: is not a folder with a model (config.json) of Hugging Face's; nothing is downloaded here: "
                "fetch one first, such as hf download openai-community/gpt2-large --local-dir FOLDER"
            )
        _check_files(path, where)
        try:
            import transformers
        except ImportError as error:
            raise UserError(f"{where}: to score text with it, pip install 'unmask[hf]'") from error
        transformers.utils.logging.disable_progress_bar()
        scorer = cls(_model(transformers, str(path), where, device), _tokenizer(transformers, str(path), where), folder)
        scorer._check(where)
        return scorer

    @torch.no_grad()
    def score(self, passages: Sequence[Passage]) -> list[Scored]:
        """Computes the likelihood of each passage.

        Raises:
            UserError: the tokenizer has tokens that the model does not know.
            NotFinite: the model gives nan.
        """
        encoded = [self._encode(passage) for passage in passages]
        costs: dict[int, float] = {}
        for batch in _batches([len(own.ids) for own in encoded]):
            found = self._costs([encoded[i] for i in batch]).tolist()
            check_finite(found, self.name, "text", batch)
            costs |= zip(batch, found, strict=True)
        return [Scored(costs[i], own.counted, own.is_cut, own.unknown) for i, own in enumerate(encoded)]

    def token_nll(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l-1"]:
        """Computes `-log p(ids[i] | ids[<i])` from the second token on, in fp32."""
        all_seen = torch.ones_like(ids)  # padding too: it comes after a text, which cannot see it
        logits = self.model(input_ids=ids, attention_mask=all_seen, use_cache=False).logits[:, :-1].float()
        return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")

    def about(self) -> dict[str, Any]:
        """Describes the model, for a protocol."""
        size = sum(parameter.numel() for parameter in self.model.parameters())
        kind = self.model.config.model_type
        return {"folder": self.name, "type": kind, "parameters": size, "context": self.context, "start": self.start}

    def _encode(self, passage: Passage) -> "_Encoded":
        """Encodes given text and text together: tokens may span both.

        The text begins with the first token that differs from those of the given text alone.
        """
        given, whole = (
            self.tokenizer.encode(text, add_special_tokens=False) for text in (passage.given, "".join(passage[::-1]))
        )
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(given, whole, strict=False))))
        start = [] if self.start is None else [self.start]
        ids, head = [*start, *whole][: self.context], len(start) + shared
        counted = max(0, len(ids) - max(1, head))  # nothing says how likely the very first token is
        unknown = sum(i == self.tokenizer.unk_token_id for i in ids[head:])
        return _Encoded(ids, counted, len(start) + len(whole) > len(ids), unknown)

    def _costs(self, batch: "list[_Encoded]") -> Float[Tensor, "b"]:
        if not any(own.counted for own in batch):
            return torch.zeros(len(batch), dtype=torch.float64)
        device = self.model.device
        length = max(len(own.ids) for own in batch)
        ids = torch.tensor([own.ids + [0] * (length - len(own.ids)) for own in batch], device=device)
        self._check_ids(int(ids.max()))
        end = torch.tensor([len(own.ids) for own in batch], device=device).unsqueeze(1)
        start = end - torch.tensor([own.counted for own in batch], device=device).unsqueeze(1)
        place = torch.arange(1, length, device=device)
        nll = noise.wide(self.token_nll(ids)) * ((place >= start) & (place < end))
        return nll.sum(dim=-1).cpu().double()

    def _check(self, where: str) -> None:
        """Raises `UserError` unless the model is causal: later tokens must not matter."""
        ids = torch.tensor([[0, 1, 2], [0, 1, 3]], device=self.model.device)
        with torch.no_grad():
            first, second = self.model(input_ids=ids, use_cache=False).logits[:, 1].float()
        if (first - second).abs().max() > 0.01 * first.abs().max():  # bf16 keeps 8 bits
            raise UserError(f"{where}: is not a causal model: what it says of a token depends on later ones")

    def _check_ids(self, largest: int) -> None:
        rows = self.model.get_input_embeddings().weight.shape[0]
        if largest >= rows:
            raise UserError(
                f"{self.name}: its tokenizer has the id {largest}, its model only {rows} rows of embeddings: they do "
                "not belong together"
            )


class _Encoded(NamedTuple):
    ids: list[int]
    counted: int
    is_cut: bool
    unknown: int


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yields the numbers of texts of similar length, up to `_TOKENS_AT_ONCE` tokens a batch with padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > _TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _start(config: Any, tokenizer: Any) -> int | None:
    for name in ("bos_token_id", "eos_token_id"):
        for own in (tokenizer, config):
            if isinstance(token := getattr(own, name, None), int):
                return token
    return None


def _check_files(path: Path, where: str) -> None:
    """Checks that a model's weights are safetensors, and that its settings name no code that would be fetched."""
    try:
        config: dict[str, Any] = formats.read_json(path / "config.json", dict[str, Any])
    except UserError as error:
        raise UserError(f"{where}: cannot be read as a causal language model: {error}") from error
    inner = [config]
    for settings in inner:  # those of the parts of a model stand within
        inner += [value for value in settings.values() if isinstance(value, dict)]
        for key, value in settings.items():
            if key.endswith("_implementation") and "/" in str(value):
                raise UserError(
                    f"{where}: config.json: {key}={str(value)[:80]!r} names code of others; delete that line"
                )
    if (path / "adapter_config.json").exists():
        raise UserError(f"{where}: is an adapter of another model; merge them, and save the whole model here")
    weights = [file for file in path.iterdir() if file.suffix == ".safetensors"]
    if not weights and any(file.suffix in _PICKLES for file in path.iterdir()):
        raise UserError(
            f"{where}: holds its weights as a pickle, which can run code when it is read; save them as safetensors: "
            "model.save_pretrained(FOLDER), in a place where you may trust it"
        )
    for file in (*weights, path / "config.json"):
        if not file.is_file():
            raise UserError(f"{where}: {file.name} is no regular file")
    index = path / "model.safetensors.index.json"
    if index.exists():
        hf_weights.listed_files(index)


def _model(transformers: Any, path: str, where: str, device: torch.device) -> Any:
    dtype = "auto" if device.type == "cuda" else torch.float32
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
        )
    except Exception as error:  # whatever the files make it stumble over
        raise UserError(f"{where}: cannot be read as a causal language model: {first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{where}: lacks weights of a causal language model, such as {missing[0]}; give another, or all of this one"
        )
    return model.to(device).eval()


def _tokenizer(transformers: Any, path: str, where: str) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"{where}: holds no tokenizer that can be read ({first_line(error)}); copy the model's tokenizer.json and "
            "tokenizer_config.json into it"
        ) from error
