"""What `against_reference.py` measures, each job in a process of its own: `python reference_jobs.py REQUEST` (JSON).

The reference implementation is imported from its folder and is not part of this repository.
"""

import contextlib
import importlib
import io
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

Result = dict[str, Any]
Request = dict[str, Any]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Wrong(Exception):
    """What the user can put right."""


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


def asked_only(module: Any, mask_id: int) -> Callable[..., Any]:
    """A predictor that applies the module's head at the positions asked for, as `Denoiser.predict` does."""
    from unmask.models.head import prediction

    def predict(xt: Tensor, at: Tensor, query: Any) -> Any:
        hidden = module.emb(xt)
        for layer in module.layers:
            hidden = layer(hidden)
        hidden = module.final_norm(hidden.flatten(0, 1)[at])
        return prediction(hidden, module.lm_head.weight, query, mask_id=mask_id)

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


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], object]) -> float:
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
    from unmask.lab.bench import peak_rss_bytes  # only now, as the import would count towards the reference's peak

    return peak_rss_bytes()


def machine(_: Request) -> Result:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else None
    rates = {f"{name}_matmul_gflops": matmul_gflops(getattr(torch, name)) for name in ("float32", "bfloat16")}
    return {"cpu": found[1] if found else platform.processor(), "gpu": gpu, "torch": torch.__version__, **rates}


def matmul_gflops(dtype: torch.dtype) -> int:
    """Of 2048 x 2048, unless that took minutes, as bfloat16 does on a CPU without instructions for it."""
    small = _gflops(dtype, size=256, repeats=3)
    return max(1, round(small if small < 5 else _gflops(dtype, size=2048, repeats=8)))


def _gflops(dtype: torch.dtype, size: int, repeats: int) -> float:
    matrix = torch.randn(size, size, device=DEVICE).to(dtype)
    return 2 * size**3 / min(seconds_of(lambda: matrix @ matrix) for _ in range(repeats)) / 1e9


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


if __name__ == "__main__":
    sys.exit(worker(sys.argv[1]))
