"""Writes the model card of an exported model: what it is, how it was trained, and how to decode from it."""

from typing import Any

from unmask.config.settings import name_of
from unmask.models.transformer import TransformerConfig
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

**transformers' own `generate` is autoregressive: it runs, and what it writes is nonsense here.**
transformers before 5.2 ignores `is_causal` and computes something else, without an error.

`unmask decode FOLDER` and `unmask chat FOLDER` decode with every order, rule and cache of
unmask. In plain transformers, the most confident position first:

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


def model_card(source: LoadedRun, settings: dict[str, Any], *, has_tokenizer: bool) -> str:
    """Returns the text of `README.md` beside a `config.json` with the content `settings`."""
    config, tokens = source.config.model, source.tokens
    assert isinstance(config, TransformerConfig)
    is_next, size = config.alignment == "next", config.block_size
    facts = {"class": f"`{settings['architectures'][0]}`"}
    if source.step:
        facts["trained"] = (
            f"{source.step:,} steps, task `{source.config.task.name}`, process `{name_of(source.config.process)}`, "
            f"{source.weights} weights"
        )
    if not config.causal:
        facts |= {
            "alignment": f"`{config.alignment}`: the logits at {'i - 1' if is_next else 'i'} predict position i",
            "mask": f"{tokens.mask_id}",
            "a position sees": "all others" if size is None else f"its own block of {size} and those before it",
        }
    facts["end"] = "none" if tokens.eos_id is None else f"{tokens.eos_id}"
    facts["canvas"] = f"{tokens.length} positions, prompt included"
    facts["vocabulary"] = f"{settings['vocab_size']:,} tokens"
    facts["tokenizer"] = "beside the weights" if has_tokenizer else "none: ids alone"
    what = "An autoregressive language model" if config.causal else "A masked diffusion language model"
    head = _HEAD.format(
        tags="unmask" if config.causal else "unmask, masked-diffusion",
        title=what.removeprefix("An ").removeprefix("A ").capitalize(),
        what=f"{what}, made with unmask, in the layout of transformers: no remote code.",
        table="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
    )
    if config.causal:
        return head + _CAUSAL
    blocks = (
        ""
        if size is None
        else "**transformers' class alone lets every position see all others.** This model was trained with "
        f"`block_size` {size}: a position must not see later blocks, so every call "
        "needs a 4-D attention mask, as below.\n\n"
    )
    return (
        head
        + blocks
        + _MASKED.format(
            mask=tokens.mask_id,
            setup="" if size is None else _BLOCK_SETUP.format(size=size),
            seen="" if size is None else ", attention_mask=hidden",
            shift=".roll(1, dims=1)  # position i is read at i - 1" if is_next else "",
            restrict="" if size is None else _BLOCK_RESTRICT,
            given="; the first position must be given" if is_next else "",
        )
    )
