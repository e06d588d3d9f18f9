"""Times decoding from an imported checkpoint against transformers' own forward pass in a plain loop, in turn.

    python benchmarks/smollm2.py models/smollm2
    python benchmarks/imported_speed.py models/smollm2 --rounds 3

Both see the same weights, with every position visible, a random prompt, and reveal the surest masked positions, the
same number a step. Any special token serves as the mask: nothing here depends on what the model has learned. Without a
cache both compute the same function, so in float32 the tokens must be the same. Caches of blocks are approximations.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.config.settings import check_section
from unmask.decoding.config import DecodeConfig
from unmask.decoding.decoder import Decoder
from unmask.training import sources
from unmask.training.loading import LoadedRun

OURS: dict[str, dict[str, object]] = {
    "exact": {},
    "blocks of 32, cache=prefix": {"block_size": 32, "cache": "prefix"},
    "blocks of 32, cache=dual": {"block_size": 32, "cache": "dual"},
}


@torch.no_grad()
def plain_loop(model: Any, canvas: Tensor, mask_id: int, tokens_per_step: int) -> Tensor:
    """Reveals the positions with the highest probability until none is masked. `canvas` is (1, L)."""
    xt = canvas.clone()
    while (masked := xt[0] == mask_id).any():
        logits = model(xt).logits[0].float()
        logits[:, mask_id] = -torch.inf
        confidence, token = logits.softmax(-1).max(-1)
        at = confidence.where(masked, -1.0).topk(min(tokens_per_step, int(masked.sum()))).indices
        xt[0, at] = token[at]
    return xt


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a Llama or Qwen checkpoint")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--answer", type=int, default=256, help="masked positions, the last ones")
    parser.add_argument("--tokens-per-step", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="compile our model; takes a minute or two at first")
    given = parser.parse_args()

    tokenizer = transformers.AutoTokenizer.from_pretrained(given.folder)
    mask_id = max(set(tokenizer.all_special_ids) - {tokenizer.eos_token_id, tokenizer.bos_token_id})
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(given.folder, dtype=getattr(torch, given.dtype))
    theirs.config.is_causal = False
    with tempfile.TemporaryDirectory() as folder:
        stated = {"mask_id": mask_id, "alignment": "same", "length": given.length}
        sources.find("hf", given.folder, stated).write(Path(folder) / "own")
        run = LoadedRun.open(Path(folder) / "own", device="cpu")
    generator = torch.Generator().manual_seed(0)
    canvas = torch.randint(100, mask_id if mask_id > 100 else len(tokenizer), (1, given.length), generator=generator)
    canvas[0, given.length - given.answer :] = mask_id
    base = {"order": "prob", "tokens_per_step": given.tokens_per_step, "dtype": given.dtype, "stop_early": False}
    base |= {"compile": given.compile}
    decoders: dict[str, Decoder] = {
        name: run.decoder(check_section(DecodeConfig, base | settings, "decode")) for name, settings in OURS.items()
    }
    expected = plain_loop(theirs.eval(), canvas, mask_id, given.tokens_per_step)
    same = (decoders["exact"].decode(canvas.clone()).tokens == expected).float().mean()
    print(f"tokens equal to the plain loop's: {100 * float(same):.1f} %")
    seconds: dict[str, list[float]] = {name: [] for name in ("transformers", *OURS)}
    for _ in range(given.rounds):
        for name in seconds:
            started = time.perf_counter()
            if name == "transformers":
                plain_loop(theirs, canvas, mask_id, given.tokens_per_step)
            else:
                decoders[name].decode(canvas.clone())
            seconds[name].append(time.perf_counter() - started)
    for name, each in seconds.items():
        ratios = [a / b for a, b in zip(seconds["transformers"], each, strict=True)]
        print(json.dumps({"name": name, "seconds": statistics.median(each), "times_faster": statistics.median(ratios)}))


if __name__ == "__main__":
    main()
