"""The clock, the interleaved protocol, and what a device could do at best."""

from __future__ import annotations

import contextlib
import gc
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from flowturbo.networks.precision import has_bf16

Name = TypeVar("Name")
Keep = Callable[[list[dict[str, Any]]], object]  # is given all rows so far, as JSON types, whenever there are more


@dataclass
class Timing:
    """The seconds that calls of one function took."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)

    def quantile(self, part: float) -> float:
        """The time that this part of the calls stays within."""
        return sorted(self.seconds)[round(part * (len(self.seconds) - 1))]


def stopwatch(device: torch.device, wall: bool = False) -> Callable[[Callable[[], object]], float]:
    """What measures the seconds of a call: by events on CUDA; on a CPU by the process time if it has one thread,
    which other programs disturb least, else, or where it waits for other processes, by the wall."""

    def on_cuda(call: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1000

    clock = time.process_time if torch.get_num_threads() == 1 and not wall else time.perf_counter

    def on_cpu(call: Callable[[], object]) -> float:
        begin = clock()
        call()
        return clock() - begin

    return on_cuda if device.type == "cuda" else on_cpu


def interleave(
    calls: Mapping[Name, Callable[[], object]],
    device: torch.device,
    *,
    repeats: int,
    warm_up: int,
    title: str = "",
    on_round: Callable[[Mapping[Name, Timing]], object] = lambda timings: None,
    wall: bool = False,
) -> dict[Name, Timing]:
    """Time the calls in turn, round by round, so that whatever disturbs the machine disturbs them all.

    Python collects its garbage between the rounds, never within. `on_round` is given the timings after each round;
    `wall` as of `stopwatch`.
    """
    seconds = stopwatch(device, wall)
    timings = {name: Timing() for name in calls}
    total = (repeats + warm_up) * len(calls)
    with tqdm(total=total, unit="call", desc=title, leave=False, disable=None) as bar:
        for k in range(-warm_up, repeats):
            with no_collection():
                for name, call in calls.items():
                    spent = seconds(call)
                    if k >= 0:
                        timings[name].seconds.append(spent)
                    bar.update()
            if k >= 0:
                on_round(timings)
    return timings


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Within it Python's garbage collector stands still: it would run in whichever call comes next, and for long."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    """The call so many times in a row."""

    def run() -> None:
        for _ in range(times):
            call()

    return run


def flops(call: Callable[[], object]) -> int:
    """Floating point operations of the matrix products, convolutions and attentions of a call, 2 a multiply-add."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


@dataclass
class Roofline:
    """The best rates that this device reaches here: matrix products by type, FLOP/s, and copies, bytes/s."""

    products: dict[str, float]  # float32, bfloat16 where the device multiplies it itself, and the type measured in
    copy: float

    def of(self, dtype: torch.dtype) -> float:
        """The rate of products in a type."""
        return self.products[name_of(dtype)]

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in self.products.items())
        return f"matrix products here: {rates}; copies {self.copy / 1e9:.3g} GB/s"


def name_of(dtype: torch.dtype) -> str:
    """float32, bfloat16, float16."""
    return str(dtype).removeprefix("torch.")


def roofline(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> Roofline:
    """Measured with large square products (8192, on a CPU 2048), and one large copy (1 GiB, on a CPU 1/4)."""
    size = 8192 if device.type == "cuda" else 2048
    dtypes = dict.fromkeys([torch.float32, *([torch.bfloat16] if has_bf16(device) else []), dtype])
    pairs = {kind: torch.randn(2, size, size, device=device).to(kind) for kind in dtypes}
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {name_of(kind): partial(torch.matmul, *pairs[kind]) for kind in dtypes}
    calls["copy"] = lambda: target.copy_(source)
    timings = interleave(calls, device, repeats=repeats, warm_up=3, title="roofline")
    best = {name: min(timing.seconds) for name, timing in timings.items()}
    copied = best.pop("copy")
    return Roofline({name: 2 * size**3 / spent for name, spent in best.items()}, 2 * 4 * source.numel() / copied)


def kernel_seconds(
    rows: int, tokens: int, width: int, heads: int, hidden: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Seconds of the bare kernels of one transformer block at its real shapes; the floor under an evaluation.

    Each is launched many times in a row, so that what is measured is the kernel and not its launch.
    """
    x = torch.randn(rows * tokens, width, device=device).to(dtype)
    wide = torch.randn(rows * tokens, hidden, device=device).to(dtype)
    weights = {
        name: torch.randn(shape, device=device).to(dtype)
        for name, shape in {
            "qkv": (3 * width, width),
            "proj": (width, width),
            "fc1": (hidden, width),
            "fc2": (width, hidden),
        }.items()
    }
    q, k, v = torch.randn(3, rows, heads, tokens, width // heads, device=device).to(dtype)

    def product(name: str) -> Callable[[], Tensor]:
        return lambda: F.linear(wide if name == "fc2" else x, weights[name])

    calls: dict[str, Callable[[], Tensor]] = {name: product(name) for name in weights}
    calls["attention"] = lambda: F.scaled_dot_product_attention(q, k, v)
    launches = 100 if device.type == "cuda" else 1

    with torch.no_grad():
        rounds = {name: repeated(call, launches) for name, call in calls.items()}
        timings = interleave(rounds, device, repeats=10, warm_up=3, title="bare kernels")
    return {name: timing.median / launches for name, timing in timings.items()}


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call holds at its peak above what was held before it; on a CPU of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError):  # where it may not, the peak is that of the whole process so far
        Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    """Bytes of this process by the system's count; 0 where it has none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)


def describe(device: torch.device) -> list[str]:
    """What a figure depends on: device, clocks, versions, attention backends, threads."""
    lines = [f"torch {torch.__version__}, Python {platform.python_version()}"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        q = torch.empty(2, 16, 256, 72, device=device, dtype=torch.bfloat16)
        backend = SDPBackend(torch._fused_sdp_choice(q, q, q)).name
        clock = f"{getattr(properties, 'clock_rate', 0) / 1000:.0f} MHz at most"
        lines.insert(0, f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {clock}")
        lines.append(f"CUDA {torch.version.cuda}, attention by {backend}")
        lines.append(f"TF32 in float32 products: {torch.backends.cuda.matmul.allow_tf32}")
    else:
        lines.insert(0, f"{processor()}, threads: {torch.get_num_threads()} (one is clocked by process time)")
        lines.append(f"instructions {torch.backends.cpu.get_cpu_capability()}")
    return lines


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()
