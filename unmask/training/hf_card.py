"""Writes the model card of an exported model: what it is, how it was trained, and how to decode from it."""

from unmask.config.settings import name_of
from unmask.data.vocabulary import Vocabulary
from unmask.decoding.config import DecodeConfig
from unmask.models.families import FAMILIES, LAYOUTS, OURS
from unmask.models.transformer_config import TransformerConfig
from unmask.training.loading import LoadedRun

_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---

# {title}

{what}

| | |
| --- | --- |
{table}

"""
_CAUSAL = """## Decoding

transformers' own `generate` decodes from it, from left to right:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(FOLDER)
```

`unmask decode FOLDER` does so too.
"""
_MASKED = """## Decoding

**transformers before 5.2 ignores `is_causal`: the model is silently causal there, and what it computes is wrong,
without an error.** From 5.2 on its logits are right, but **transformers' own `generate` is autoregressive: it runs, and
what it writes is nonsense here.**

{unmask} In plain transformers, the most confident position first:

```python
import torch
import transformers

assert tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 2)
model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER).eval()
MASK = {mask}


@torch.no_grad()
def decode(ids):
    \"\"\"Fills in the masks of one row of ids, of shape (1, length), one a step.\"\"\"
    ids = ids.clone()
{setup}    while (ids == MASK).any():
        logits = model(ids{seen}).logits.float(){shift}
        logits[..., MASK] = -torch.inf  # nothing was learned about it
        probability, token = logits.softmax(-1).max(-1)
        probability[ids != MASK] = -1
{restrict}        at = probability.argmax(-1)
        ids[0, at] = token[0, at]
    return ids
```

`ids` is the prompt and then `MASK`, {mask}, at every position to fill in{given}.
"""
_BLOCK_SETUP = """    block = torch.arange(ids.shape[1]) // {size}
    hidden = torch.where(block[:, None] >= block, 0.0, torch.finfo(torch.float32).min)[None, None].to(model.dtype)
"""
_BLOCK_RESTRICT = """        probability[:, block > block[(ids == MASK)[0]].min()] = -1  # the first unfinished block
"""
_UNMASK = "`unmask decode FOLDER` and `unmask chat FOLDER` decode with every order, rule and cache of unmask."
_ORIGINALS = """
Loading it in transformers needs the originals' code, which `auto_map` takes from `{repository}` on the Hub
(`trust_remote_code=True`) and which runs on transformers 4 alone. Without a network, put its files beside the weights
and take `{repository}--` out of `auto_map`.
"""
_SDAR = """## Decoding

{unmask} SGLang and lmdeploy serve it:

```
python -m sglang.launch_server --model-path FOLDER --trust-remote-code --dllm-algorithm LowConfidence
```

```python
from lmdeploy import PytorchEngineConfig, pipeline

engine = PytorchEngineConfig(dllm_block_length={size}, dllm_denoising_steps={size})
print(pipeline("FOLDER", backend_config=engine)(["Hello"]))
```

Both take token 151669 for the mask, whatever `mask_token_id` says{mask_fits}.
"""
_DREAM = """## Decoding

{unmask} Dream's own:

```python
from transformers import AutoModel

model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
settings = model.generation_config  # the order, `alg`, and the mask
model.diffusion_generate(input_ids, generation_config=settings, max_new_tokens=N, steps=N)
```
"""
_LLADA = """## Decoding

{unmask} LLaDA's own is the function `generate` of `generate.py` in `ML-GSAI/LLaDA`:

```python
from transformers import AutoModel

model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
generate(model, prompt, steps=N, gen_length=N, block_length=N, temperature=0.0, mask_id={mask})
```
"""
_REMOTE = """## Decoding

{unmask} In transformers (4.57 and later), without unmask:

```python
{torch}from transformers import AutoModel{auto_tokenizer}

model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
{call}
```

`generate` takes `order`, `tokens_per_step`, `threshold`, `block_size`, and of transformers' own arguments
`attention_mask`, `max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`; what is not given is in
`generation_config.json`{missing}. Masks inside a prompt are filled in too.
`model(ids).logits[:, i]` predicts position i; the mask has -inf there{given}.
The code is one file, `modeling_unmask.py`: read it before you trust it.
"""
_MISSING = """,
but for {settings}: `generate` does not know that, and writes other tokens than `unmask decode` does"""
_CALL = {
    True: """tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs)))""",
    False: """ids = torch.full((1, {length}), {mask})  # masks, but for what is given
model.generate(ids, max_new_tokens=0)""",
}
_SECTIONS = {OURS: _REMOTE, "plain": _MASKED, "sdar": _SDAR, "dream": _DREAM, "llada": _LLADA}
_KINDS = {
    OURS: "as a folder for unmask, and with its own code for transformers",
    **{name: f"in the layout of {layout.title}" for name, layout in LAYOUTS.items()},
    "plain": "in the layout of transformers: no remote code",
}


def model_card(source: LoadedRun, layout: str, *, num_rows: int, has_tokenizer: bool) -> str:
    """Returns the text of `README.md` of a model in a layout, whose embedding has `num_rows` rows there."""
    config, tokens = source.config.model, source.tokens
    assert isinstance(config, TransformerConfig)
    missing = [f"`{each}`" for each in not_in_our_code(source.config.decode)]
    is_next, size = config.alignment == "next", config.block_size
    what = "An autoregressive language model" if config.causal else "A masked diffusion language model"
    head = _HEAD.format(
        tags="unmask" if config.causal else "unmask, masked-diffusion",
        title=what.removeprefix("An ").removeprefix("A ").capitalize(),
        what=f"{what}, made with unmask, {_KINDS[layout]}.",
        table="\n".join(
            f"| {key} | {value} |" for key, value in _facts(source, layout, num_rows, has_tokenizer).items()
        ),
    )
    if config.causal and layout != OURS:
        return head + _CAUSAL
    if layout == "plain" and size is not None:
        head += (
            "**transformers' class alone lets every position see all others.** This model was trained with "
            f"`block_size` {size}: a position must not see later blocks, so every call "
            "needs a 4-D attention mask, as below.\n\n"
        )
    section = _SECTIONS[layout].format(
        unmask=_UNMASK,
        torch="" if has_tokenizer else "import torch\n",
        auto_tokenizer=", AutoTokenizer" if has_tokenizer else "",
        call=_CALL[has_tokenizer].format(length=tokens.length, mask=tokens.mask_id),
        mask=tokens.mask_id,
        size=size,
        mask_fits=""
        if tokens.mask_id == 151669
        else f", so that **they cannot serve this model**: its mask is {tokens.mask_id}",
        setup="" if size is None else _BLOCK_SETUP.format(size=size),
        seen="" if size is None else ", attention_mask=hidden",
        shift=".roll(1, dims=1)  # position i is read at i - 1" if is_next else "",
        restrict="" if size is None else _BLOCK_RESTRICT,
        given="; the first position must be given" if is_next else "",
        missing=_MISSING.format(settings=", ".join(missing)) if missing else "",
    )
    code = FAMILIES[LAYOUTS[layout].families[0]].code if layout in LAYOUTS else {}
    if code:
        section += _ORIGINALS.format(repository=code["AutoConfig"].partition("--")[0])
    if config.tied_head and layout != OURS:
        section += (
            "\nWhere another program decodes, give the mask the logit -inf: nothing was learned about it, and with a "
            "tied head it can win.\n"
        )
    return head + section


_IN_OUR_CODE = {"order", "tokens_per_step", "threshold", "block_size", "reads_ahead", "stop_early"} | {
    *("temperature", "top_k", "top_p"),
    "seed",  # transformers draws from numbers of its own
}


def not_in_our_code(decode: DecodeConfig) -> list[str]:
    """Returns the settings that decide what a run decodes, but that `generate` beside an export does not know."""
    return [f"decode.{key}={value}" for key, value in decode.decisive.items() if key not in _IN_OUR_CODE]


def _facts(source: LoadedRun, layout: str, num_rows: int, has_tokenizer: bool) -> dict[str, str]:
    """Returns what the table of the card says."""
    config, tokens = source.config.model, source.tokens
    assert isinstance(config, TransformerConfig)
    facts = {"network": f"{config.num_layers} layers, width {config.dim}"}
    if source.step:
        facts["trained"] = (
            f"{source.step:,} steps, task `{source.config.task.name}`, process `{name_of(source.config.process)}`, "
            f"{source.weights} weights"
        )
    if not config.causal:
        size, place = config.block_size, "i - 1" if config.alignment == "next" else "i"
        facts |= {
            "alignment": f"`{config.alignment}`: position i is read at {place}",
            "mask": f"{tokens.mask_id}",
            "a position sees": "all others" if size is None else f"its own block of {size} and those before it",
            "decoded by default" if layout == OURS else "its run decodes": f"`{source.config.decode.label}`",
        }
    vocabulary = getattr(source.task, "vocabulary", None)
    if start := [*getattr(source.task, "start_ids", ())]:
        facts["start"] = f"{', '.join(map(str, start))}, before every text"
    facts["end"] = "none" if tokens.eos_id is None else f"{tokens.eos_id}"
    if tokens.eos_id is None and isinstance(vocabulary, Vocabulary):
        facts["end"] = f"none in a run's rows; {vocabulary.eos_id} ends a document"
    facts["canvas"] = f"{tokens.length} positions, prompt included"
    facts["vocabulary"] = f"{num_rows:,} tokens"
    facts["tokenizer"] = "beside the weights" if has_tokenizer else "none: ids alone"
    return facts
