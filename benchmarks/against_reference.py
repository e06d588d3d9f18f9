"""PUMA's reference implementation and unmask in turn, at the same sizes: a training step, and decoding.

    git clone https://github.com/JaeyeonKim01/PUMA
    python benchmarks/against_reference.py --reference PUMA [--only sudoku-step tinygsm] [--rounds 3] [--json FILE]

Rows: sudoku-step, tinygsm-step; decode-same and sudoku-decode-same, where both decode with the reference's module and
must agree on every token; decode-own and sudoku-decode-own, each with its own model. Every measurement has a process of
its own, so that its peak memory is its own, and the two systems take turns, so that a machine that slows down slows
both. On a CPU the reference runs in fp32, as its autocast is for CUDA alone; "with autocast" puts one around it.

Random weights and tokens. The reference is imported from its folder and is not part of this repository. Exit codes:
0 done, 1 failed or the tokens differ, 2 a wrong argument or folder.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

Result = dict[str, Any]
Request = dict[str, Any]
FILES = ("progressive.py", "sampling.py", "model/transformer.py", "model/ema.py")
SUDOKU, TINYGSM = "yaml_files/sudoku_puma.yaml", "yaml_files/tinygsm_puma.yaml"
IN_FP32, IN_BF16 = ["train.dtype=float32"], ["train.dtype=bfloat16"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Row:
    """Something to measure. `ours` holds settings over the recipe's by label; `alone` too, for peak memory only."""

    kind: str
    config: str
    recipe: str
    batch: int
    masked: int
    tokens: int = 1
    steps: int = 20
    warm_up: int = 3
    prompt_key: str | None = None
    ours: dict[str, list[str]] = field(default_factory=dict)
    alone: dict[str, list[str]] = field(default_factory=dict)


GSM = Row("step", TINYGSM, "tinygsm/puma", batch=4, masked=412, steps=3, warm_up=1, prompt_key="data.prompt_length")
OWN = {"ours, fp32": ["decode.dtype=float32"], "ours, bf16": ["decode.dtype=bfloat16"]}
ROWS = {
    "sudoku-step": Row(
        "step", SUDOKU, "sudoku/paper_puma", batch=32, masked=81, ours={"ours, bf16": IN_BF16, "ours, fp32": IN_FP32}
    ),
    "tinygsm-step": replace(
        GSM,
        ours={"ours, bf16": IN_BF16, "ours, bf16, no EMA": [*IN_BF16, "ema.decay=0"], "ours, fp32": IN_FP32},
        alone={"ours, bf16, B 32": [*IN_BF16, "train.batch_size=32"]},
    ),
    "decode-same": replace(GSM, kind="same", batch=8, masked=256, tokens=2),
    "decode-own": replace(GSM, kind="own", batch=8, masked=256, tokens=2, ours=OWN),
    "sudoku-decode-same": Row("same", SUDOKU, "sudoku/paper_puma", batch=32, masked=81, tokens=3),
    "sudoku-decode-own": Row("own", SUDOKU, "sudoku/paper_puma", batch=32, masked=81, tokens=3, ours=OWN),
}


class Wrong(Exception):
    """What the user can put right."""


class Failed(Exception):
    """A measurement that ended without a result."""


# The reference, in a process of its own


def sizes(reference: str, config: str) -> dict[str, Any]:
    """The reference's settings; `model` holds the arguments of its configuration class."""
    settings = yaml.safe_load((Path(reference) / config).read_text())
    settings["model"]["rms_norm_eps"] = float(settings["model"]["rms_norm_eps"])  # to PyYAML, 1e-6 is a string
    return settings


def reference_module(reference: str, name: str) -> ModuleType:
    if reference not in sys.path:
        sys.path.insert(0, reference)
    with contextlib.suppress(ImportError):  # only its checkpoints need this one
        importlib.import_module("omegaconf")
    sys.modules.setdefault("omegaconf", SimpleNamespace(OmegaConf=None))  # type: ignore[arg-type]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Wrong(f"{reference}: cannot import {name}: {error}") from error


def reference_model(request: Request) -> nn.Module:
    transformer, sizes = reference_module(request["reference"], "model.transformer"), request["settings"]["model"]
    torch.manual_seed(0)
    model = transformer.MDMTransformer(transformer.MDMConfig(**sizes))
    if sizes.get("tie_lm_head"):
        # An embedding of N(0, 1) that is the head too is sure, from the start, that a masked position holds the mask
        # token: the pool would then reveal everything at once, which a model that has trained a little does not.
        model.emb.weight.data.mul_(0.02)
    return model.to(DEVICE)


def precision(name: str) -> torch.autocast:
    if name == "as it runs":
        return torch.autocast("cuda", torch.bfloat16, enabled=DEVICE.type == "cuda")
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=name == "with autocast")


def reference_step(request: Request) -> Result:
    model = reference_model(request).train()
    step = training_step(request, model)
    for _ in range(request["warm_up"]):
        step()
    return {"seconds": statistics.median(seconds_of(step) for _ in range(request["steps"])), **about(model, request)}


def training_step(request: Request, model: nn.Module) -> Callable[[], float]:
    """All that the reference's training loop does in a step, from the pool's canvases to the loss it shows."""
    progressive = reference_module(request["reference"], "progressive")
    training, mask_id = request["settings"]["training"], mask_of(request)
    lr, decay = float(training["learning_rate"]), training["weight_decay"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / training["warmup_steps"]))
    pool = reference_pool(progressive, request)
    update_average = reference_average(request, model)
    kept = SimpleNamespace()  # its loop's local variables, which live until the next step overwrites them

    def step() -> float:
        with precision(request["precision"]):
            kept.logits = model(pool.current_batch())
            kept.log_probs = F.log_softmax(kept.logits, dim=-1)
            prompt_mask = pool.state["prompt_mask"]
            kept.loss = progressive.mdm_loss_fn(kept.log_probs, pool.x0, pool.xt, mask_id, prompt_mask=prompt_mask)
        optimizer.zero_grad()
        kept.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), training["max_grad_norm"])
        optimizer.step()
        update_average()
        scheduler.step()
        pool.update_with_logits(kept.log_probs)
        return kept.loss.item()

    return step


def reference_average(request: Request, model: nn.Module) -> Callable[[], None]:
    decay = request["settings"]["training"]["ema"]
    if decay is None:
        return lambda: None
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    average = reference_module(request["reference"], "model.ema").ExponentialMovingAverage(parameters, decay=decay)
    return lambda: average.update(parameters)


def reference_pool(progressive: ModuleType, request: Request) -> Any:
    training, mask_id, batch = request["settings"]["training"], mask_of(request), request["batch"]
    length = request["settings"]["model"]["max_position"]
    prompt_mask = (torch.arange(length) < length - request["masked"]).expand(batch, length)
    loader = [{"labels": torch.randint(mask_id, (batch, length)), "prompt_mask": prompt_mask} for _ in range(16)]
    options = {key: training[key] for key in ("mode", "confidence_threshold", "eos_id")}
    return progressive.PhasedMasking(loader, batch, mask_id, training["K"], DEVICE, length, **options)


class WithoutMaskToken(nn.Module):
    """The reference's module, the mask token forbidden: its sampler would write it, and then never come to an end."""

    def __init__(self, module: nn.Module, mask_id: int, autocast: torch.autocast) -> None:
        super().__init__()
        self.module, self.mask_id, self.autocast = module, mask_id, autocast
        self.calls = 0

    def forward(self, xt: Tensor) -> Tensor:
        self.calls += 1
        with self.autocast:
            logits = self.module(xt)
        logits[..., self.mask_id] = -torch.inf
        return logits


def canvas(request: Request, num_masked: int) -> Tensor:
    """Random tokens, `num_masked` positions of each row masked."""
    mask_id, length = mask_of(request), request["settings"]["model"]["max_position"]
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randint(mask_id, (request["batch"], length), generator=generator)
    place = torch.rand(x0.shape, generator=generator).argsort(dim=-1)
    return x0.masked_fill(place < num_masked, mask_id).to(DEVICE)


@torch.no_grad()
def reference_decode(request: Request) -> Result:
    """Over a few steps, and scaled: each computes, and softmaxes, the logits of all positions, whatever is masked."""
    sample, mask_id = reference_module(request["reference"], "sampling").mdm_sampling, mask_of(request)
    model = WithoutMaskToken(reference_model(request).eval(), mask_id, precision(request["precision"]))
    options = SimpleNamespace(temperature=0.0, confidence="top_k", unmasking_num=request["tokens"])
    sample(model, canvas(request, request["tokens"]), mask_id, options)  # one step, to warm up
    few, decoded = canvas(request, num_few(request)), []
    model.calls = 0
    seconds = seconds_of(lambda: decoded.append(sample(model, few, mask_id, options)))
    tokens = decoded[0][few == mask_id].tolist()
    return {"seconds": seconds / model.calls * num_steps(request), "tokens": tokens, **about(model, request)}


# unmask, in a process of its own


def bench(request: Request) -> Result:
    """`unmask bench`, called rather than run: it does not print the peak memory of a GPU."""
    from unmask.cli import main as unmask

    out, arguments = io.StringIO(), ["bench", *request["arguments"], "--json"]
    with contextlib.redirect_stdout(out):
        code = unmask(arguments)
    if code:
        raise Wrong(f"unmask {' '.join(arguments)}: exit code {code}")
    found = json.loads(out.getvalue().splitlines()[-1])
    if "nfe" in found and found["nfe"] != num_steps(request):
        raise Wrong(f"{request['arguments'][1]} took {found['nfe']:g} steps to decode, not {num_steps(request)}")
    return {**found, "seconds": found.get("seconds_per_step") or found["seconds"]}


@torch.no_grad()
def module_decode(request: Request) -> Result:
    """Our decoder with the reference's module: what it decodes from few masks, and its time from all of them."""
    import unmask

    mask_id, module = mask_of(request), reference_model(request).eval()
    predict = unmask.predictor_from_logits(module, mask_id=mask_id) if request["plain"] else asked_only(module, mask_id)
    decoder = unmask.Decoder(predict, mask_id=mask_id, order="prob", rule=unmask.Fixed(request["tokens"]))
    few = canvas(request, num_few(request))
    tokens = decoder.decode(few).tokens[few == mask_id].tolist()
    return {"seconds": decoding_seconds(decoder, request), "tokens": tokens, **about(module, request)}


def asked_only(module: Any, mask_id: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A predictor that applies the module's head at the positions asked for, as `Denoiser.predict` does."""

    def predict(xt: Tensor, at: Tensor) -> Tensor:
        hidden = module.emb(xt)
        for layer in module.layers:
            hidden = layer(hidden)
        logits = module.lm_head(module.final_norm(hidden.flatten(0, 1)[at]))
        logits[:, mask_id] = -torch.inf
        return logits

    return predict


def decoding_seconds(decoder: Any, request: Request) -> float:
    """Of the whole canvas; with `levels`, from single steps at masked counts spread evenly over it."""
    whole, levels = canvas(request, request["masked"]), request["levels"]
    one_step_seconds(decoder, whole)  # warms up, and has the peak memory of a full canvas
    if not levels:
        return seconds_of(lambda: decoder.decode(whole))
    masked = [max(1, round(request["masked"] * (level + 0.5) / levels)) for level in range(levels)]
    return statistics.mean(one_step_seconds(decoder, canvas(request, n)) for n in masked) * num_steps(request)


def one_step_seconds(decoder: Any, xt: Tensor) -> float:
    steps = decoder.steps(xt)
    next(steps)  # the canvas as it is
    return seconds_of(lambda: next(steps))


# What the workers share


def seconds_of(run: Callable[[], object]) -> float:
    synchronize = torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - started


def about(model: nn.Module, request: Request) -> Result:
    is_bf16 = request["precision"] == ("as it runs" if DEVICE.type == "cuda" else "with autocast")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"dtype": "bfloat16" if is_bf16 else "float32", "parameters": parameters}


def mask_of(request: Request) -> int:
    return request["settings"]["data"]["mask_id"]


def num_steps(request: Request) -> int:
    return -(-request["masked"] // request["tokens"])


def num_few(request: Request) -> int:
    return min(request["masked"], request["reference_steps"] * request["tokens"])


def peak_bytes() -> int:
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    from unmask.benchmark import peak_rss_bytes  # only now, as the import would count towards the reference's peak

    return peak_rss_bytes()


def machine(_: Request) -> Result:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else None
    rates = {f"{name}_matmul_gflops": matmul_gflops(getattr(torch, name)) for name in ("float32", "bfloat16")}
    return {"cpu": found[1] if found else platform.processor(), "gpu": gpu, "torch": torch.__version__, **rates}


def matmul_gflops(dtype: torch.dtype, size: int = 2048) -> int:
    matrix = torch.randn(size, size, device=DEVICE).to(dtype)
    return round(2 * size**3 / min(seconds_of(lambda: matrix @ matrix) for _ in range(8)) / 1e9)


JOBS = {
    "machine": machine,
    "reference-step": reference_step,
    "reference-decode": reference_decode,
    "bench": bench,
    "module-decode": module_decode,
}


def worker(text: str) -> int:
    request = json.loads(text)
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    try:
        result = JOBS[request["job"]](request)
    except Wrong as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps({**result, "threads": torch.get_num_threads(), "peak_bytes": peak_bytes()}))
    return 0


# Taking turns


def run_worker(request: Request, device: str) -> Result:
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}
    command = [sys.executable, __file__, "worker", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode == 2:
        raise Wrong(done.stderr.strip())
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise Failed(f"{request['job']}: ended with {done.returncode} (-9: no memory left, as a rule). {last}")
    return json.loads(done.stdout.splitlines()[-1])


def requests(row: Row, arguments: argparse.Namespace) -> dict[str, Request]:
    """What is measured in a round, by label."""
    options = {key: getattr(arguments, key) for key in ("reference", "reference_steps", "levels", "threads")}
    shared = {**asdict(row), **options, "settings": sizes(arguments.reference, row.config)}
    variants = ["float32"] if row.kind == "same" else ["as it runs", "with autocast"]
    if arguments.device == "cuda":
        variants = variants[:1]  # as it runs, it has autocast
    job = "reference-step" if row.kind == "step" else "reference-decode"
    asked = {f"reference, {name}": {**shared, "job": job, "precision": name} for name in variants}
    if row.kind == "same":
        for label, is_plain in {"ours, head where asked": False, "ours, any callable": True}.items():
            asked[label] = {**shared, "job": "module-decode", "plain": is_plain, "precision": "float32"}
    for label, settings in (row.ours | row.alone).items():
        command = bench_arguments(row, shared["settings"], 1 if label in row.alone else row.steps)
        asked[label] = {**shared, "job": "bench", "arguments": [*command, *settings, *arguments.ours]}
    return asked


def bench_arguments(row: Row, settings: dict[str, Any], count: int) -> list[str]:
    prompt_length = settings["model"]["max_position"] - row.masked
    prompt = [f"{row.prompt_key}={prompt_length}"] if row.prompt_key else []
    if row.kind == "step":
        return ["step", row.recipe, "--count", str(count), f"train.batch_size={row.batch}", *prompt]
    return ["decode", row.recipe, "--rows", str(row.batch), f"decode.tokens_per_step={row.tokens}", *prompt]


def measure(name: str, row: Row, arguments: argparse.Namespace) -> dict[str, list[Result]]:
    asked = requests(row, arguments)
    results: dict[str, list[Result]] = {label: [] for label in asked}
    for number in range(arguments.rounds):
        for label, request in asked.items():
            if number and label in row.alone:
                continue
            print(f"{name}, round {number + 1} of {arguments.rounds}: {label}", file=sys.stderr)
            try:
                results[label].append(run_worker(request, arguments.device))
            except Failed as error:
                if label not in row.alone:
                    raise
                print(f"{name}: left out, {label}: {error}", file=sys.stderr)
                del results[label]
    return results


def agreement(results: dict[str, list[Result]]) -> dict[str, float]:
    """The share of tokens that are the reference's, of each of ours."""
    expected = next(iter(results.values()))[0]["tokens"]
    return {
        label: statistics.mean(a == b for each in found for a, b in zip(each["tokens"], expected, strict=True))
        for label, found in results.items()
        if label.startswith("ours")
    }


def ratios(results: dict[str, list[Result]], row: Row) -> dict[str, dict[str, list[float]]]:
    """The reference over ours, round by round: above 1, ours needs less."""
    found = {}
    for label, theirs in results.items():
        for other, ours in results.items():
            if label.startswith("reference") and other.startswith("ours") and other not in row.alone:
                pairs = list(zip(theirs, ours, strict=True))
                found[f"{label} / {other}"] = {k: [a[k] / b[k] for a, b in pairs] for k in ("seconds", "peak_bytes")}
    return found


def print_row(name: str, row: Row, results: dict[str, list[Result]], arguments: argparse.Namespace) -> None:
    print(f"\n{name}: B {row.batch}, {row.masked} positions of a row maskable; {row.config} against {row.recipe}")
    if row.kind != "step":
        print(
            f"greedy by prob, {row.tokens} a step; reference: timed over {arguments.reference_steps} steps and scaled"
        )
    if row.kind == "same":
        print(
            f"ours: timed at {arguments.levels} fill levels and scaled" if arguments.levels else "ours: timed in full"
        )
    print(f"{'':<30} {'dtype':<9} {'parameters':>11} {'seconds: median (range)':>32} {'peak GiB':>9}")
    for label, found in results.items():
        seconds = [each["seconds"] for each in found]
        spread = f"{statistics.median(seconds):.4g} ({min(seconds):.4g} to {max(seconds):.4g})"
        peak = max(each["peak_bytes"] for each in found) / 2**30
        parameters = found[0].get("parameters", "")
        print(f"{label:<30} {found[0]['dtype']:<9} {parameters:>11} {spread:>32} {peak:>9.2f}")
    print(f"{'reference over ours: min median max':<54} {'time':>18} {'peak memory':>18}")
    for label, ratio in ratios(results, row).items():
        print(f"{label:<54} {three(ratio['seconds']):>18} {three(ratio['peak_bytes']):>18}")


def three(values: list[float]) -> str:
    return f"{min(values):.2f} {statistics.median(values):.2f} {max(values):.2f}"


OPTIONS: dict[str, dict[str, Any]] = {
    "reference": {"required": True, "metavar": "DIR", "help": "the reference implementation"},
    "only": {"nargs": "+", "default": [""], "metavar": "ROW", "help": "rows, or what their names start with"},
    "rounds": {"type": int, "default": 3},
    "device": {"choices": ("auto", "cpu", "cuda"), "default": "auto"},
    "threads": {"type": int, "help": "CPU threads; PyTorch's choice, unless given"},
    "json": {"type": Path, "metavar": "FILE", "help": "also write all measurements there"},
    "steps": {"type": int, "help": "training steps to measure, or batch, masked, tokens: the row's, unless given"},
    "batch": {"type": int, "help": "rows"},
    "masked": {"type": int, "help": "maskable positions of a row"},
    "tokens": {"type": int, "help": "revealed in a step of decoding"},
    "reference-steps": {"type": int, "default": 6, "help": "decoding steps to time the reference over, and to compare"},
    "levels": {"type": int, "default": 4, "help": "fill levels at which decode-same times ours; 0: in full"},
    "ours": {"nargs": "+", "default": [], "metavar": "key=value", "help": "more settings for unmask bench"},
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, option in OPTIONS.items():
        parser.add_argument(f"--{name}", **option)
    arguments = parser.parse_args(argv)
    for name, value in vars(arguments).items():
        if isinstance(value, int) and value < (name != "levels"):
            raise Wrong(f"--{name.replace('_', '-')} {value}: too small")
    if wrong := [start for start in arguments.only if not any(name.startswith(start) for name in ROWS)]:
        raise Wrong(f"--only {' '.join(wrong)}: no such row; there are {', '.join(ROWS)}")
    return arguments


def check(arguments: argparse.Namespace) -> None:
    """Settles what is left open, and looks for what the workers will need."""
    folder = Path(arguments.reference).resolve()
    if missing := [name for name in (*FILES, SUDOKU, TINYGSM) if not (folder / name).is_file()]:
        raise Wrong(f"--reference {folder}: has no {', '.join(missing)}; give a clone of JaeyeonKim01/PUMA")
    if arguments.device == "cuda" and DEVICE.type == "cpu":
        raise Wrong("--device cuda: there is none")
    arguments.reference = str(folder)
    arguments.device = DEVICE.type if arguments.device == "auto" else arguments.device


def chosen(arguments: argparse.Namespace) -> dict[str, Row]:
    given = {key: getattr(arguments, key) for key in ("steps", "batch", "masked", "tokens") if getattr(arguments, key)}
    starts = tuple(arguments.only)
    rows = {name: replace(row, **given) for name, row in ROWS.items() if name.startswith(starts)}
    for name, row in rows.items():
        length = sizes(arguments.reference, row.config)["model"]["max_position"]
        if row.masked > length:
            raise Wrong(f"--masked {row.masked}: {name} has {length} positions")
    return rows


def compare(arguments: argparse.Namespace) -> None:
    check(arguments)
    rows = chosen(arguments)
    computer = run_worker({"job": "machine", "threads": arguments.threads}, arguments.device)
    print(", ".join(f"{key} {computer[key]}" for key in computer if key != "peak_bytes"))
    report, differing = {"machine": computer, "rows": {}}, []
    for name, row in rows.items():
        results = measure(name, row, arguments)
        print_row(name, row, results, arguments)
        report["rows"][name] = {"measurements": results, "ratios": ratios(results, row)}
        for label, share in (agreement(results) if row.kind == "same" else {}).items():
            print(f"{label}: {share:.2%} of the tokens are the reference's")
            differing += [f"{name}, {label}"] if share < 1 else []
        if arguments.json:  # after every row, as the next may take an hour
            arguments.json.write_text(json.dumps(report, indent=1))
    if differing:
        raise Failed(f"tokens differ from the reference's: {'; '.join(differing)}")


def main(argv: list[str] | None = None) -> int:
    try:
        compare(parse(argv))
    except (Wrong, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, Wrong) else 1
    return 0


if __name__ == "__main__":
    sys.exit(worker(sys.argv[2]) if sys.argv[1:2] == ["worker"] else main())
