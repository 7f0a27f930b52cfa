"""One optimisation at a time: what each brings to sampling, what compiling takes, and the error of each."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch._inductor.utils
from torch import Tensor
from tqdm import tqdm

from benchmarks.measure import Keep, Roofline, interleave
from benchmarks.options import Plan
from benchmarks.published import PlainSiT, ReleasedStyle
from benchmarks.variants import (
    Error,
    Networks,
    build_networks,
    error,
    noise_and_labels,
    reference,
)
from flowturbo.models import run_block
from flowturbo.networks.compiled import CannotCompile, StaticGraphs, check_compiler
from flowturbo.networks.patches import block_step
from flowturbo.networks.precision import quantize
from flowturbo.sampling.solvers import parse_schedule
from flowturbo.system import cli
from flowturbo.transport import FlowTurbo

Run = Callable[[Tensor, Tensor], Tensor]


ASIDE = ("released code, compiled network by network", "blocks compiled, each of them")


@dataclass
class Row:
    """The state after one more optimisation; `ratio` to the first row, `gain` to the state before.

    Rows in ASIDE are no states that the next one builds on.
    """

    change: str
    schedule: str
    batch_size: int
    decode: bool
    ms: float
    p10: float
    p90: float
    ratio: float
    gain: float
    first_call: float  # seconds, with nothing in the compiler's caches on disk
    error: Error


def measure(plan: Plan, best: Roofline, keep: Keep) -> list[Row]:
    """A table for each schedule, batch size, with and without decoding."""
    networks = build_networks(plan)
    rows: list[Row] = []
    for schedule in plan.schedules:
        for batch_size in plan.batch_sizes:
            for decode in plan.decode:
                group = measure_group(plan, networks, schedule, batch_size, decode)
                print(f"{schedule}, batch {batch_size}, {'with' if decode else 'without'} decoding; {best}")
                print(table(group), end="\n\n", flush=True)
                rows += group
                keep([asdict(row) for row in rows])
    return rows


def variants(plan: Plan, networks: Networks, schedule: str, decode: bool) -> dict[str, Callable[[], Run]]:
    """What makes the sampling function after each change, in their order."""
    cuda, half = plan.device.type == "cuda", plan.dtype != torch.float32
    named = parse_schedule(schedule)
    slow = networks.autoencoder.decode if decode else None
    fast = networks.fast_compiled_autoencoder.decode if decode else None
    slow_compiled = networks.compiled_autoencoder.decode if decode else None
    full = (PlainSiT(networks.predictor), PlainSiT(networks.refiner), named, plan.cfg_scale)
    held = (networks.fast_predictor, networks.fast_refiner, named, plan.cfg_scale)

    def static(*, decode: Callable[[Tensor], Tensor] | None, graphs: bool = True, recording: bool = False) -> Run:
        sampler = FlowTurbo(*held, engine=StaticGraphs, decode=decode)
        assert isinstance(sampler.engine, StaticGraphs)
        sampler.engine.recording = recording
        if not graphs:
            sampler.engine.step = block_step
            sampler.engine.run = dict.fromkeys(sampler.engine.run, run_block)
        return sampler.sample

    def whole() -> Run:
        sampler = FlowTurbo(*held, engine=StaticGraphs, decode=slow)
        assert isinstance(sampler.engine, StaticGraphs)
        sampler.engine.recording = False
        sampler.engine.step = torch.compile(block_step, fullgraph=True, dynamic=False)
        sampler.engine.run = dict.fromkeys(sampler.engine.run, run_block)
        return sampler.sample

    def quantized() -> Run:
        predictor, refiner = copy.deepcopy(networks.fast_predictor), copy.deepcopy(networks.fast_refiner)
        for network in (predictor, refiner):
            quantize(network, "float8" if cuda else "int8")
        settings = (named, plan.cfg_scale)
        return FlowTurbo(predictor, refiner, *settings, engine=StaticGraphs, decode=fast).sample

    made: dict[str, Callable[[], Run]] = {
        "released code, float32": lambda: ReleasedStyle(*full, torch.float32, decode=slow).sample
    }
    if half:
        made["released code, autocast"] = lambda: ReleasedStyle(*full, plan.dtype, decode=slow).sample
    made[ASIDE[0]] = lambda: ReleasedStyle(*full, plan.dtype, compile=True, decode=slow_compiled).sample
    if half:
        made["blocks held in half precision"] = lambda: ReleasedStyle(*held, torch.float32, decode=slow).sample
    made["state not doubled"] = lambda: FlowTurbo(*held, decode=slow).sample
    made["conditioning beforehand"] = lambda: static(decode=slow, graphs=False)
    made[ASIDE[1]] = whole
    made["blocks compiled, one for all: --compile"] = lambda: static(decode=slow)
    if decode:
        made[
            "decoder in the precision, channels last, compiled" if cuda else "decoder in the precision, channels last"
        ] = lambda: static(decode=fast)
    if cuda:
        made["one CUDA graph"] = lambda: static(decode=fast, recording=True)
    if find_spec("torchao"):
        made[f"{'float8' if cuda else 'int8'} products"] = quantized
    return made


@torch.no_grad()
def measure_group(plan: Plan, networks: Networks, schedule: str, batch_size: int, decode: bool) -> list[Row]:
    z, y = noise_and_labels(networks, batch_size)
    exact = reference(networks, schedule, plan.cfg_scale, decode).sample(z, y)
    torch._dynamo.reset()
    calls: dict[str, Callable[[], Tensor]] = {}
    first, errors = {}, {}
    changes = variants(plan, networks, schedule, decode)
    for name, build in tqdm(changes.items(), desc="first calls", unit="variant", leave=False, disable=None):
        with torch._inductor.utils.fresh_cache():
            with suppress(CannotCompile):  # it prepares its headers, once
                check_compiler(plan.device)
            try:
                run = build()
                begin = time.perf_counter()
                result = run(z, y)
            except ValueError as reason:  # 8 bits on a device that cannot, or no compiler
                tqdm.write(f"{name}: left out: {cli.one_line(reason)}")
                continue
            first[name], errors[name] = time.perf_counter() - begin, error(result, exact)
            tqdm.write(f"{name}: first call {first[name]:.1f} s, error {errors[name].rms:.1e}")
            sys.stdout.flush()
        calls[name] = partial(run, z, y)
    timings = interleave(calls, plan.device, repeats=plan.repeats, warm_up=max(1, plan.warm_up), title="ablation")
    rows: list[Row] = []
    before = 0.0
    for name, timing in timings.items():
        ms = 1000 * timing.median / batch_size
        before = before or ms
        rows.append(
            Row(
                change=name,
                schedule=schedule,
                batch_size=batch_size,
                decode=decode,
                ms=ms,
                p10=1000 * timing.quantile(0.1) / batch_size,
                p90=1000 * timing.quantile(0.9) / batch_size,
                ratio=rows[0].ms / ms if rows else 1.0,
                gain=before / ms,
                first_call=first[name],
                error=errors[name],
            )
        )
        before = before if name in ASIDE else ms
    return rows


def table(rows: list[Row]) -> str:
    head = (
        f"{'+':<50}{'ms/img':>9}{'p10':>9}{'p90':>9}{'ratio':>7}{'gain':>7}{'first s':>9}{'rms err':>9}{'max err':>9}"
    )
    lines = [head, "-" * len(head)]
    for row in rows:
        lines.append(
            f"{row.change:<50}{row.ms:>9.2f}{row.p10:>9.2f}{row.p90:>9.2f}{row.ratio:>7.2f}{row.gain:>7.2f}"
            f"{row.first_call:>9.1f}{row.error.rms:>9.1e}{row.error.largest:>9.1e}"
        )
    return "\n".join(lines)
