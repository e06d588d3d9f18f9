"""The measurements of `unmask bench`. No data is read: tokens are random, in the task's shape."""

import hashlib
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import cast

import torch

from unmask import machine
from unmask.config.run import RunConfig
from unmask.data.stream import ExampleStream
from unmask.decoding.build import build_decoder
from unmask.masking.process import MaskingProcess
from unmask.models.build import build_denoiser
from unmask.models.cost import require_memory_for_rows
from unmask.models.lora import draw_base, has_adapters
from unmask.models.precision import resolve_device, resolve_dtype
from unmask.tasks.task import Task, build_task
from unmask.training.trainer import Trainer
from unmask.types import MaskedBatch, TokenStats

_WARM_UP = 4  # an even number; see `_median_step`
Result = dict[str, float | int | str]


def step(config: RunConfig, *, count: int) -> Result:
    """Measures `count` training steps after a warm-up.

    `seconds_per_step` is a median (`_median_step`); `process_share` is the part of it that the masking process takes,
    reveals included.
    """
    _set_threads(config)
    task = build_task(config)
    trainer = _trainer(config, task)
    timed = _TimedProcess(trainer.process, trainer.device)
    trainer.process = cast(MaskingProcess, timed)  # it has all that a step needs of a process
    trainer.choose_attention()
    totals, shares, weights = [], [], []
    first_step = 0.0
    # On a GPU the process is timed in steps of its own: to wait for it would keep the host from running ahead.
    is_gpu = trainer.device.type != "cpu"
    for number in range(_WARM_UP + count * (1 + is_gpu)):
        timed.seconds, timed.is_on = 0.0, not is_gpu or number >= _WARM_UP + count
        started = time.perf_counter()
        report = trainer.step()
        _synchronize(trainer.device)
        total = time.perf_counter() - started
        first_step = total if number == 0 else first_step
        if _WARM_UP <= number < _WARM_UP + count:
            totals.append(total)
            weights.append(report.batch.weight)
        if number >= _WARM_UP and timed.is_on:
            shares.append(timed.seconds / total)
    seconds = _median_step(totals)
    return {
        "seconds_per_step": seconds,
        "examples_per_second": config.train.batch_size / seconds,
        **_peaks(trainer.device),
        "process_share": statistics.median(shares),
        "scored_per_row": int((torch.cat(weights) > 0).sum()) / (count * config.train.batch_size),
        "compile_seconds": max(0.0, first_step - seconds),
        "steps": count,
        "dtype": trainer.model.compute_dtype,
        "compiled": trainer.is_compiled,
        "attention": trainer.attention or "auto",
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }


def decode(config: RunConfig, *, rows: int) -> Result:
    """Measures decoding of `rows` canvases as the section `decode` says, with random weights."""
    _set_threads(config)
    task = build_task(config)
    device = resolve_device(config.train.device)
    dtype = resolve_dtype(config.decode.dtype or config.train.dtype, device)
    require_memory_for_rows(
        config.model, task.tokens, rows=rows, at_once=rows, trained=False, what=f"--rows {rows}", device=device
    )
    model = build_denoiser(config.model, task.tokens, seed=config.train.seed, dtype=dtype, device=device).eval()
    if has_adapters(model):
        draw_base(model, config.train.seed)
    whole = config.decode.model_copy(update={"batch_size": rows})
    decoder = build_decoder(whole, model, task.tokens, rows=rows)
    clean = task.synthetic_stream(config.train.seed)[torch.arange(rows)]
    xt = clean.masked(task.tokens.mask_id).to(device)
    if config.decode.compile:
        model.compile_decoding()
    deque(islice(decoder.steps(xt), 3), maxlen=0)  # two steps warm up
    started = time.perf_counter()
    decoded = decoder.decode(xt)
    _synchronize(device)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "nfe": decoded.nfe.cpu().double().mean().item(),
        "tokens_per_second": (~clean.prompt_mask).sum().item() / seconds,
        "tokens_sha256": hashlib.sha256(decoded.tokens.cpu().numpy().tobytes()).hexdigest(),
        **_peaks(device),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
    }


def memory(config: RunConfig, *, count: int) -> Result:
    """Measures peak memory after a tenth of `count` steps and after all of them; a leak shows as growth."""
    _set_threads(config)
    task = build_task(config)
    trainer = _trainer(config, task)
    early = 0
    for number in range(count):
        trainer.step()
        early = peak_rss_bytes() if number <= count // 10 else early
    late = peak_rss_bytes()
    return {"steps": count, "early_peak_bytes": early, "peak_rss_bytes": late, "growth_bytes": late - early}


def _trainer(config: RunConfig, task: Task) -> Trainer:
    trainer = Trainer(config, task.tokens, task.synthetic_stream(config.train.seed))
    if has_adapters(trainer.model):
        draw_base(trainer.model, config.train.seed)
    return trainer


def _median_step(totals: list[float]) -> float:
    """Returns half of the median time of two steps: one in two takes longer where a model is self-conditioned."""
    pairs = [(one + other) / 2 for one, other in zip(totals[::2], totals[1::2], strict=False)]
    return statistics.median(pairs or totals)


class _TimedProcess:
    """A masking process that adds up the time it takes."""

    def __init__(self, process: MaskingProcess, device: torch.device) -> None:
        self._process, self._device = process, device
        self.seconds, self.is_on = 0.0, True

    def next_batch(self, stream: ExampleStream) -> MaskedBatch:
        with self._timed():
            return self._process.next_batch(stream)

    def observe(self, batch: MaskedBatch, stats: TokenStats) -> None:
        with self._timed():
            self._process.observe(batch, stats)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        if not self.is_on:
            yield
            return
        _synchronize(self._device)
        started = time.perf_counter()
        yield
        _synchronize(self._device)
        self.seconds += time.perf_counter() - started


def _set_threads(config: RunConfig) -> None:
    machine.use_threads(config.train.threads)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _peaks(device: torch.device) -> Result:
    """Returns the peak memory of this process, and on a GPU that of its tensors there."""
    on_device: Result = {"peak_device_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
    return {"peak_rss_bytes": peak_rss_bytes()} | on_device


def peak_rss_bytes() -> int:
    """Returns this process's peak memory. On Linux, `ru_maxrss` would start at the peak of the calling process."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
