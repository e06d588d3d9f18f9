"""The model `unmask` of lm-evaluation-harness: any run, export or Hugging Face checkpoint that this package reads.

Its likelihoods are those of `evaluation/continuations.py`, its answers those of the run's decoder.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from torch import Tensor, distributed

from unmask.config import recipes
from unmask.config.run import FEWEST_DRAWS, MOST_DRAWS
from unmask.config.settings import check_section
from unmask.decoding.build import build_decoder
from unmask.decoding.config import DecodeConfig, check_guidance
from unmask.errors import UserError
from unmask.evaluation.choices import PairEncoder, text_key
from unmask.evaluation.continuations import NUM_DRAWS, Pair, Score, cut_windows, greedy_match, score_pairs
from unmask.evaluation.statistics import root_mean_square
from unmask.peers import ALONE, Peers
from unmask.progress import progress
from unmask.tasks.text_rows import TextRows
from unmask.training.distributed import device_of
from unmask.training.loading import LoadedRun
from unmask.training.protocol import describe_model

_AT_ONCE = 256
"""Requests that are scored before their results go into lm-eval's cache."""
_MAX_TOKENS = 256
"""Tokens of an answer whose task does not say how many, as in lm-eval's own models."""
_GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")

_peers: ContextVar[Peers] = ContextVar("peers", default=ALONE)


@contextmanager
def shared_with(peers: Peers) -> Iterator[None]:
    """Models that are made inside the context share the documents of every task with `peers`."""
    token = _peers.set(peers)
    try:
        yield
    finally:
        _peers.reset(token)


@register_model("unmask")
class HarnessModel(LM):  # type: ignore[misc]  # lm_eval is untyped here
    """A model of this package, for lm-evaluation-harness.

    Args:
        path: a run, an export or a Hugging Face checkpoint.
        weights: a run's `ema` or `raw`; default: `ema` where there is an average.
        step: a run's checkpoint: `last`, `best` or a number.
        draws: masks of a continuation, at most.
        mask_seed: keys them.
        is_greedy: also say whether decoding would write the continuation: one more decoding for each request.
        device: cpu, cuda, or auto.
        batch_size: canvases that are decoded at once; auto: the run's. No answer depends on it.
        max_batch_size: not used.
        decode: settings of the decoder, over the run's section `decode`; each may also be given by its own name.

    Raises:
        UserError: an option is wrong (before the model is read), or the model is not one of text.
    """

    def __init__(
        self,
        path: str = "",
        *,
        weights: str | None = None,
        step: str | int = "last",
        draws: int = NUM_DRAWS,
        mask_seed: int = 0,
        is_greedy: bool = False,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **decode: Any,
    ) -> None:
        super().__init__()
        self.peers = _peers.get()
        self._rank, self._world_size = self.peers.rank, self.peers.size
        known = DecodeConfig.model_fields
        if unknown := [key for key in decode if key not in known]:
            raise UserError(
                f"model_args {unknown[0]}: unknown; use path, weights, step, draws, mask_seed, is_greedy, or one "
                f"of the decoder: {', '.join(known)}"
            )
        if not path:
            raise UserError("model_args path: is missing; give path=RUN")
        if type(draws) is not int or not FEWEST_DRAWS <= draws <= MOST_DRAWS:
            raise UserError(f"model_args draws={draws!r}: must be a whole number from {FEWEST_DRAWS} to {MOST_DRAWS}")
        check_section(DecodeConfig, decode, "model_args")
        self.batch_size = _read_batch_size(batch_size)
        self.draws, self.mask_seed, self.is_greedy = draws, int(mask_seed), bool(is_greedy)
        self.loaded = LoadedRun.open(path, weights=weights, step=str(step), device=_read_device(device, self.peers))
        self.decode = recipes.updated(self.loaded.config.decode, decode, "decode")
        check_guidance(self.decode, self.loaded.config.data)
        self.task = self.loaded.task
        if not isinstance(self.task, TextRows):
            raise UserError(f"{path}: is no model of text, of conversations, or an imported one; it answers no text")
        self._key = self.task.prompt_key
        self.pair_encoder = PairEncoder.of(self.task)
        self.model = self.loaded.prepare(self.decode)
        self.length = self.loaded.tokens.length
        self._device = self.loaded.device
        self._is_templated = False
        self._errors: list[float | None] = []

    # --- likelihoods -------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Scores continuations; all those of one document get the same masks."""
        keys: dict[Any, int] = {}
        pairs = []
        for number, request in enumerate(requests):
            context, continuation = request.args
            document = (request.task_name, number if request.doc_id is None else request.doc_id)
            key = keys.setdefault(document, text_key(context.rstrip()))
            pairs.append(self._encode_pair(context, continuation, key))
        found: list[tuple[float, bool]] = []
        for start in range(0, len(pairs), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            matches = self._match(pairs[part]) if self.is_greedy else [False] * len(pairs[part])
            own = [(score.value, match) for score, match in zip(self._score(pairs[part]), matches, strict=True)]
            for request, result in zip(requests[part], own, strict=True):
                self.cache_hook.add_partial("loglikelihood", request.args, result)
            found += own
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Scores whole texts, in windows of the length that the model was trained on, each token once."""
        found = []
        for request in requests:
            (text,) = request.args
            start = self.pair_encoder.start or (self.pair_encoder.vocabulary.eos_id,)
            windows = cut_windows(self.pair_encoder.vocabulary.encode(text), start, self.length, text_key(text))
            value = math.fsum(score.value for score in self._score(windows))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
            found.append(value)
        return found

    def _encode_pair(self, context: str, continuation: str, key: int) -> Pair:
        """Encodes a request; what a chat template has written begins as the template says."""
        encoder = replace(self.pair_encoder, start=()) if self._is_templated else self.pair_encoder
        return encoder.encode(context, continuation, key)

    def _score(self, pairs: Sequence[Pair]) -> list[Score]:
        scores = score_pairs(self.model, pairs, length=self.length, draws=self.draws, seed=self.mask_seed)
        self._errors += [score.stderr for score in scores]
        return scores

    def _match(self, pairs: Sequence[Pair]) -> list[bool]:
        """Returns whether the surest tokens, one at a time, are the continuations."""
        greedy = recipes.updated(
            self.decode, {"tokens_per_step": 1, "temperature": 0.0, "top_k": None, "top_p": None}, "decode"
        )
        rows = [
            (pair.context[-max(1, self.length - len(pair.continuation)) :], len(pair.continuation)) for pair in pairs
        ]
        canvases = [self._canvas(list(context), size) for context, size in rows]
        decoded = self._decode_all(canvases, [greedy] * len(rows), list(range(len(rows))))
        return [
            greedy_match(tokens, replace(pair, context=context))
            for tokens, pair, (context, _) in zip(decoded, pairs, rows, strict=True)
        ]

    # --- answers -----------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Decodes answers of `max_gen_toks` tokens at most, and cuts them at the first of the texts `until`.

        A canvas is the prompt and as many masks, up to the model's length, whose noise is that of the document's
        number; canvases of different sizes are never in one batch, so no answer depends on the others.
        """
        asked = [_Generation.read(request.args[1], self.decode) for request in requests]
        canvases, rooms = [], []
        for request, own in zip(requests, asked, strict=True):
            ids = self._encode_prompt(request.args[0])
            rooms.append(len(ids) + min(own.max_tokens, self.length - len(ids)))
            canvases.append(self._canvas(ids, own.max_tokens))
        numbers, seen = [], Counter[int]()
        for place, request in enumerate(requests):
            number = place if request.doc_id is None else request.doc_id
            numbers.append(number + (seen[number] << 32))  # a repeated request draws anew
            seen[number] += 1
        decoded = self._decode_all(canvases, [own.decode for own in asked], numbers)
        found = []
        for request, own, canvas, tokens, room in zip(requests, asked, canvases, decoded, rooms, strict=True):
            text = own.cut(self.task.record(canvas[:room], tokens[:room])["text"])
            self.cache_hook.add_partial("generate_until", request.args, text)
            found.append(text)
        return found

    def _encode_prompt(self, text: str) -> list[int]:
        """Encodes a prompt as the run's own task does, or one that a chat template has written as it is.

        One as long as the canvas keeps its end, in half of it, as everywhere in this package.
        """
        if self._is_templated:
            ids = self.pair_encoder.vocabulary.encode_with_ends([text])[0]
            return ids if len(ids) < self.length else ids[-(self.length // 2) :]
        (canvas,) = self.task.prompts([json.dumps({self._key: text})], "a prompt")
        return canvas[canvas != self.task.tokens.mask_id].tolist()

    def _canvas(self, ids: Sequence[int], size: int) -> Tensor:
        unit = self.model.block_size or 1
        length = min(self.length, len(ids) + size)
        canvas = torch.full((length + -length % unit,), self.task.tokens.mask_id)
        canvas[: len(ids)] = torch.tensor(ids)
        return canvas

    def _decode_all(
        self, canvases: Sequence[Tensor], settings: Sequence[DecodeConfig], numbers: Sequence[int]
    ) -> list[Tensor]:
        groups: dict[Any, list[int]] = defaultdict(list)
        for place, (canvas, own) in enumerate(zip(canvases, settings, strict=True)):
            groups[len(canvas), own.model_dump_json()].append(place)
        found: dict[int, Tensor] = {}
        with progress("Decoding", len(canvases)) as update:
            for places in groups.values():
                own = settings[places[0]]
                decoder = build_decoder(own, self.model, self.loaded.tokens, rows=len(places))
                size = self.batch_size or own.batch_size
                for rows in (places[start : start + size] for start in range(0, len(places), size)):
                    batch = torch.stack([canvases[place] for place in rows]).to(self._device)
                    keys = torch.tensor([numbers[place] for place in rows], device=self._device)
                    found |= dict(zip(rows, decoder.decode(batch, keys).tokens.cpu(), strict=True))
                    update(len(found))
        return [found[place] for place in range(len(canvases))]

    # --- several processes -------------------------------------------------------------------------------------------

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Returns the tensors of all processes, flat and joined. Collective."""
        own = tensor.reshape(-1).tolist()
        return torch.tensor([each for part in self.peers.exchange(own) for each in part])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Returns the objects of all processes on `dst`, None on the others. Collective."""
        if self.world_size == 1:
            return [obj]
        found = [None] * self.world_size if self.rank == dst else None
        distributed.gather_object(obj, found, dst)  # not JSON: lm-eval's metrics are of any type
        return found

    def barrier(self) -> None:
        """Waits for all processes. Collective."""
        self.peers.exchange(None)

    # --- templates and results ---------------------------------------------------------------------------------------

    @cached_property
    def _conversations(self) -> Any:
        encoder = getattr(self.task, "encoder", None)
        if encoder is None:
            raise UserError("--apply_chat_template: the model has no chat template; leave it out")
        return encoder

    @property
    def tokenizer_name(self) -> str:
        """A hash of the vocabulary and the template, which tells cached requests apart."""
        return f"{text_key(self.pair_encoder.vocabulary.fingerprint + self._conversations.template.source):x}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Returns the template's source, or an empty text if none is asked for."""
        if isinstance(chat_template, str):
            raise UserError(f"--apply_chat_template {chat_template}: the model has one template; give no name")
        return str(self._conversations.template.source) if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Writes a conversation, and the header of the answer to it, by the model's template, in its sandbox."""
        self._is_templated = True
        try:
            text = self._conversations.template.render(chat_history, asks=add_generation_prompt).text
        except ValueError as error:
            raise UserError(f"--apply_chat_template: {error}") from error
        return str(text)

    def get_model_info(self) -> dict[str, Any]:
        """Describes how this model was measured, for lm-eval's results."""
        return {
            "unmask": {
                "run": str(self.loaded.path),
                **describe_model(self.loaded, self.model),
                "draws": self.draws,
                "mask_seed": self.mask_seed,
                "loglikelihood_stderr": root_mean_square(self._errors),
                "decoder": self.decode.model_dump(mode="json"),
            }
        }


@dataclass(frozen=True)
class _Generation:
    """The settings of answers that a task asks for: how they are decoded, and cut."""

    decode: DecodeConfig
    max_tokens: int
    until: list[str]

    @staticmethod
    def read(given: dict[str, Any], decode: DecodeConfig) -> "_Generation":
        """Reads a request's settings; a temperature counts where `do_sample` is set.

        Raises:
            UserError: one of them is unknown, or wrong.
        """
        if unknown := [key for key in given if key not in _GENERATION]:
            raise UserError(f"gen_kwargs {unknown[0]}: unknown; use {', '.join(_GENERATION)}")
        until = given.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        max_tokens = given.get("max_gen_toks", _MAX_TOKENS)
        if type(max_tokens) is not int or max_tokens < 1:
            raise UserError(f"gen_kwargs max_gen_toks={max_tokens!r}: must be a whole number from 1")
        if given.get("do_sample"):
            drawn = {"temperature": 1.0} | {
                key: given[key] for key in ("temperature", "top_k", "top_p") if key in given
            }
            decode = recipes.updated(decode, drawn, "decode")
        return _Generation(decode, max_tokens, [text for text in until if text])

    def cut(self, text: str) -> str:
        """Returns the text up to the first of the texts that end it."""
        return text[: min((place for stop in self.until if (place := text.find(stop)) >= 0), default=len(text))]


def _read_batch_size(asked: int | str | None) -> int | None:
    text = str(asked or "auto")
    if text.partition(":")[0] == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--batch_size {text}: must be auto, or a whole number from 1")
    return int(text)


def _read_device(asked: str | None, peers: Peers) -> str | None:
    """Returns the device; lm-eval's default, `cuda:0`, is whatever there is, and each of several processes has one."""
    is_default = asked == "cuda:0" and (peers.size > 1 or not torch.cuda.is_available())
    return None if asked is None else device_of(peers, "auto" if is_default else asked)
