"""Writes a model in a layout of Hugging Face, with its tokenizer, chat template, decoding settings and model card."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from unmask import files, formats
from unmask.data.chat_template import ChatTemplate
from unmask.data.conversations import ConversationEncoder
from unmask.data.tokenizer_files import TOKENIZER
from unmask.data.vocabulary import Vocabulary
from unmask.models.families import FAMILIES, OURS
from unmask.models.hf_writing import choose_family, hf_settings, hf_tensors, needs_our_code
from unmask.models.on_demand import outlines_of
from unmask.models.transformer_config import TransformerConfig
from unmask.progress import warn
from unmask.training.hf_card import model_card, not_in_our_code
from unmask.training.loading import LoadedRun

_MASKS = ("<|mask|>", "<|mdm_mask|>", "<|unmask_mask|>")
"""Names for a mask that the tokenizer does not have; the first that is free."""


def write_layout(source: LoadedRun, target: Path, layout: str) -> None:
    """Writes the model into the new folder `target`, in a layout of `families.LAYOUTS`.

    It holds `config.json`, `generation_config.json`, `model.safetensors` and `README.md`; of a model of text the
    tokenizer and the chat template too. A tokenizer of which the model knows some ids alone is left out with a warning:
    its ids are not the rows.

    Raises:
        UserError: the model is none that the layout can express. Nothing is written.
    """
    family = choose_family(source.config.model, layout, str(source.path))
    config, tokens = _transformer(source), source.tokens
    tensors = hf_tensors(source.checked_tensors(), config, tokens, family, has_mask_row=source.step == 0)
    settings = hf_settings(config, tokens, family, next(iter(tensors.outlines.values())).dtype)
    if layout == "sdar" and tokens.mask_id != FAMILIES[family].mask_id:
        warn(
            f"{target}: its mask is {tokens.mask_id}; SGLang and lmdeploy take {FAMILIES[family].mask_id} for the mask "
            "of every SDAR model, so they serve models with the tokenizer of Qwen3 and a mask added to it"
        )
    contents = text_files(source)
    contents |= {
        "config.json": formats.to_json(settings, indent=1) + "\n",
        "generation_config.json": formats.to_json(generation_settings(source, layout), indent=1) + "\n",
        "README.md": model_card(source, layout, num_rows=settings["vocab_size"], has_tokenizer=TOKENIZER in contents),
    }
    with files.new_folder(target) as folder:
        files.put_tensors(folder / "model.safetensors", tensors, {"format": "pt"}, outlines=tensors.outlines)
        for name, content in contents.items():
            files.put(folder / name, content)


CODE = "modeling_unmask"
"""The module that runs an export of this package in transformers; a file here, which is copied beside the weights."""


def beside_export(source: LoadedRun) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns what makes an export of this package a folder for transformers too: of its `config.json`, and its files.

    Both are empty for a model that the code cannot run, as `needs_our_code` says.
    """
    if needs_our_code(source.config.model) is not None:
        return {}, {}
    dtypes = {each.dtype for each in outlines_of(source.tensors).values()}
    autos = ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM")
    extra = {
        "model_type": "unmask",
        "architectures": ["UnmaskModel"],
        "auto_map": {"AutoConfig": f"{CODE}.UnmaskConfig", **dict.fromkeys(autos, f"{CODE}.UnmaskModel")},
        "dtype": "bfloat16" if dtypes == {torch.bfloat16} else "float32",
    }
    if missing := not_in_our_code(source.config.decode):
        warn(
            f"{source.path}: the generate of {CODE}.py does not know {', '.join(missing)}, and decodes without; this "
            "package's decode knows"
        )
    contents = text_files(source, is_needed=False)
    return extra, {
        **contents,
        f"{CODE}.py": Path(__file__).with_name(f"{CODE}.py").read_text(encoding="utf-8"),
        "generation_config.json": formats.to_json(generation_settings(source, OURS), indent=1) + "\n",
        "README.md": model_card(source, OURS, num_rows=source.tokens.vocab_size, has_tokenizer=TOKENIZER in contents),
    }


def generation_settings(source: LoadedRun, layout: str) -> dict[str, Any]:
    """Returns the content of `generation_config.json`: what ends an answer, the end token first, and how to decode."""
    tokens, decode, encoder = source.tokens, source.config.decode, _encoder(source)
    config = _transformer(source)
    share = decode.tokens_per_step
    ends = [] if tokens.eos_id is None else [tokens.eos_id]
    if encoder is not None:
        ends += sorted(encoder.end_ids - {*ends})
    found: dict[str, Any] = {"eos_token_id": ends} if ends else {}
    if tokens.pad_id is not None:
        found["pad_token_id"] = tokens.pad_id
    if layout == OURS:
        found |= {
            key: value for key in ("order", "threshold", "block_size") if (value := getattr(decode, key)) is not None
        }
        found |= {key: False for key in ("reads_ahead", "stop_early") if not getattr(decode, key)}
        found |= {"mask_token_id": tokens.mask_id, "tokens_per_step": share, "do_sample": decode.temperature > 0}
        drawn = {"temperature": decode.temperature, "top_k": decode.top_k or 0, "top_p": decode.top_p or 1.0}
        return found | (drawn if decode.temperature > 0 else {})
    if config.causal:
        is_last = tokens.mask_id == tokens.vocab_size - 1
        return found if is_last else {**found, "suppress_tokens": [tokens.mask_id]}  # nothing was learned about it
    found["mask_token_id"] = tokens.mask_id
    if layout == "dream":
        found.setdefault("pad_token_id", tokens.eos_id)
        found |= {"alg": _DREAM_ORDERS.get(decode.order, "origin"), "steps": decode.steps or -(-tokens.length // share)}
    if layout == "sdar":
        size = config.block_size or tokens.length
        has_threshold = decode.threshold is not None
        found |= {
            "block_length": size,
            "denoising_steps": size if has_threshold else -(-size // share),
            "remasking_strategy": f"low_confidence_{'dynamic' if has_threshold else 'static'}",
            **({"confidence_threshold": decode.threshold} if has_threshold else {}),
        }
    return found


_DREAM_ORDERS = {"prob": "maskgit_plus", "margin": "topk_margin", "neg_entropy": "entropy"}
"""Dream's names of our orders; `origin` draws the positions."""


def _transformer(source: LoadedRun) -> TransformerConfig:
    config = source.config.model
    assert isinstance(config, TransformerConfig), "other networks have no such files"
    return config


def _encoder(source: LoadedRun) -> ConversationEncoder | None:
    found = getattr(source.task, "encoder", None)
    return found if isinstance(found, ConversationEncoder) else None


def text_files(source: LoadedRun, *, is_needed: bool = True) -> dict[str, str]:
    """Returns the contents of the tokenizer's files, by name; none where ids are not those of a tokenizer.

    That a tokenizer is left out is warned of if it `is_needed`.
    """
    vocabulary, tokens = getattr(source.task, "vocabulary", None), source.tokens
    if not isinstance(vocabulary, Vocabulary):
        return {}
    is_whole = all(original in (None, i) for i, original in enumerate(vocabulary.original_ids))
    if not is_whole or vocabulary.vocab_size != tokens.vocab_size:
        if is_needed:
            warn(
                f"{source.path}: its model knows {tokens.vocab_size} of the tokenizer's ids, under numbers of its own, "
                "so the tokenizer is left out; for a model with the tokenizer's own ids, prepare the data with "
                "--vocab full"
            )
        return {}
    tokenizer, mask = _with_mask(vocabulary, source)
    encoder = _encoder(source)
    template = None if encoder is None else encoder.template
    # Where no answer is to end, as in running text, the token still ends documents, and who reads rows needs its name.
    named = {"eos_token": vocabulary.eos_id, "pad_token": tokens.pad_id}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokens.length,
        "model_input_names": ["input_ids", "attention_mask"],
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
    _start_with(tokenizer, [*getattr(source.task, "start_ids", ())])
    if _transformer(source).causal:
        return tokenizer, None
    without_mask = tokenizer.to_str()
    if vocabulary.original_ids[mask_id] is None:
        name = next(name for name in _MASKS if tokenizer.token_to_id(name) is None)
        tokenizer.add_special_tokens([AddedToken(name, normalized=False)])
        if tokenizer.token_to_id(name) != mask_id:  # a tokenizer that leaves ids out gives the first of these
            return Tokenizer.from_str(without_mask), None
    return tokenizer, tokenizer.id_to_token(mask_id)


def _start_with(tokenizer: Tokenizer, start: list[int]) -> None:
    """Makes the tokenizer put the ids `start` before a text, as every row has them, and nothing else around it."""
    if tokenizer.encode("a").ids == [*start, *tokenizer.encode("a", add_special_tokens=False).ids]:
        return
    # Under a name of its own, as that of a token may hold signs that mean something in a template.
    named = {"id": "start", "ids": start, "tokens": [tokenizer.id_to_token(i) for i in start]}
    template: dict[str, Any] = {"single": ["start", "$A"], "pair": ["start", "$A", "$B"], "special_tokens": [named]}
    tokenizer.post_processor = TemplateProcessing(**template) if start else None


def _with_options(template: ChatTemplate) -> str:
    """Returns the template's source, with the variables that it is rendered with as defaults."""
    defaults = (
        f"{{%- if {key} is not defined %}}{{%- set {key} = {'none' if value is None else formats.to_json(value)} %}}"
        "{%- endif -%}"
        for key, value in template.options.items()
    )
    return "".join(defaults) + template.source
