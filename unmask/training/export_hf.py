"""Exports a model as a Hugging Face folder that transformers loads by itself, with its tokenizer and a model card."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from unmask import files, formats, paths
from unmask.data.chat_template import ChatTemplate
from unmask.data.conversations import ConversationEncoder
from unmask.data.tokenizer_files import TOKENIZER
from unmask.data.vocabulary import Vocabulary
from unmask.models.hf_writing import plain_family, plain_settings, plain_tensors
from unmask.models.transformer import TransformerConfig
from unmask.progress import warn
from unmask.training.hf_card import model_card
from unmask.training.loading import LoadedRun

_MASKS = ("<|mask|>", "<|mdm_mask|>", "<|unmask_mask|>")
"""Names for a mask that the tokenizer does not have; the first that is free."""


def export_plain(
    run: str | Path, target: str | Path, *, weights: str | None = None, step: str = "last"
) -> tuple[LoadedRun, str]:
    """Writes the model as Llama, Qwen2 or Qwen3 into `target`; returns what it wrote, and the family.

    It holds `config.json`, `generation_config.json`, `model.safetensors` and `README.md`; of a model of text the
    tokenizer and the chat template too. Adapters are merged. A tokenizer of which the model knows some ids alone is
    left out with a warning: its ids are not the rows.

    Args:
        run: a run, an export, or a Hugging Face checkpoint.
        target: a new or empty folder.
        weights: a run's `ema` or `raw`; default: `ema` where there is an average.
        step: a run's checkpoint: `last`, `best` or a number, as a string.

    Raises:
        UserError: as `load`, no class of transformers is this model, or `target` holds something. Nothing is written.
    """
    path = paths.user_path(target)
    files.check_new_folder(path)
    source = LoadedRun.open(run, weights=weights, step=step, device="cpu")
    config, tokens = source.config.model, source.tokens
    family = plain_family(config, str(run))
    assert isinstance(config, TransformerConfig)
    source.model  # noqa: B018 - building it checks names, shapes and values of all weights
    tensors = plain_tensors(source.tensors, config, tokens, family)
    settings = plain_settings(config, tokens, family, next(iter(tensors.values())).dtype)
    contents = _text_files(source)
    contents |= {
        "config.json": formats.to_json(settings, indent=1) + "\n",
        "generation_config.json": formats.to_json(_generation(source, settings), indent=1) + "\n",
        "README.md": model_card(source, settings, has_tokenizer=TOKENIZER in contents),
    }
    with files.new_folder(path) as folder:
        files.put_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
        for name, content in contents.items():
            files.put(folder / name, content)
    return source, family


def _generation(source: LoadedRun, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of `generation_config.json`: what ends an answer, the end token first."""
    tokens, encoder = source.tokens, _encoder(source)
    ends = [] if tokens.eos_id is None else [tokens.eos_id]
    if encoder is not None:
        ends += sorted(encoder.end_ids - {*ends})
    found: dict[str, Any] = {"eos_token_id": ends} if ends else {}
    if tokens.pad_id is not None:
        found["pad_token_id"] = tokens.pad_id
    if source.model.backbone.is_causal and tokens.mask_id < settings["vocab_size"]:
        found["suppress_tokens"] = [tokens.mask_id]  # nothing was learned about it
    return found


def _encoder(source: LoadedRun) -> ConversationEncoder | None:
    found = getattr(source.task, "encoder", None)
    return found if isinstance(found, ConversationEncoder) else None


def _text_files(source: LoadedRun) -> dict[str, str]:
    """Returns the contents of the tokenizer's files, by name; none where ids are not those of a tokenizer."""
    vocabulary, tokens = getattr(source.task, "vocabulary", None), source.tokens
    if not isinstance(vocabulary, Vocabulary):
        return {}
    is_whole = all(original in (None, i) for i, original in enumerate(vocabulary.original_ids))
    if not is_whole or vocabulary.vocab_size != tokens.vocab_size:
        warn(
            f"{source.path}: its model knows {tokens.vocab_size} of the tokenizer's ids, under numbers of its own, so "
            "the tokenizer is left out; for a model with the tokenizer's own ids, prepare the data with --vocab full"
        )
        return {}
    tokenizer, mask = _with_mask(vocabulary, source)
    encoder = _encoder(source)
    template = None if encoder is None else encoder.template
    named = {"eos_token": tokens.eos_id, "pad_token": tokens.pad_id}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokens.length,
        "clean_up_tokenization_spaces": False,
        **{key: tokenizer.id_to_token(i) for key, i in named.items() if i is not None},
        **({} if mask is None else {"mask_token": mask}),
    }
    contents = {TOKENIZER: tokenizer.to_str(pretty=True)}
    if template is not None:
        known = {key: text for key, text in template.tokens.items() if tokenizer.token_to_id(text) is not None}
        settings |= {key: text for key, text in known.items() if key != "mask_token"}
        contents["chat_template.jinja"] = _with_options(template)
    return {**contents, "tokenizer_config.json": formats.to_json(settings, indent=1) + "\n"}


def _with_mask(vocabulary: Vocabulary, source: LoadedRun) -> tuple[Tokenizer, str | None]:
    """Returns the tokenizer as its model uses it, and its name of the mask; None for a causal model."""
    tokenizer, mask_id = Tokenizer.from_str(vocabulary.tokenizer.to_str()), source.tokens.mask_id
    if not getattr(source.config.data, "prefix", []) and len(tokenizer.encode("a").ids) > len(
        tokenizer.encode("a", add_special_tokens=False).ids
    ):
        tokenizer.post_processor = None  # the rows had none of the tokens that it adds
    if source.model.backbone.is_causal:
        return tokenizer, None
    if vocabulary.original_ids[mask_id] is None:
        name = next(name for name in _MASKS if tokenizer.token_to_id(name) is None)
        tokenizer.add_special_tokens([AddedToken(name, normalized=False)])
        if tokenizer.token_to_id(name) != mask_id:  # a tokenizer that leaves ids out gives the first of these
            return Tokenizer.from_str(vocabulary.tokenizer.to_str()), None
    return tokenizer, tokenizer.id_to_token(mask_id)


def _with_options(template: ChatTemplate) -> str:
    """Returns the template's source, with the variables that it is rendered with as defaults."""
    defaults = (
        f"{{%- if {key} is not defined %}}{{%- set {key} = {'none' if value is None else formats.to_json(value)} %}}"
        "{%- endif -%}"
        for key, value in template.options.items()
    )
    return "".join(defaults) + template.source
