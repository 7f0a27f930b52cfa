"""Sampling by every schedule: latency, what it is made of, how near to the device's limits, and its error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch._inductor.utils
from torch import Tensor
from tqdm import tqdm

from benchmarks.measure import Keep, Roofline, Timing, interleave, kernel_seconds, peak_memory, stopwatch
from benchmarks.options import Plan
from benchmarks.published import tf32
from benchmarks.report import LEGEND, Row, against_paper, ratios, tables
from benchmarks.variants import (
    FLOAT32,
    Error,
    Networks,
    Run,
    build_networks,
    error,
    make,
    noise_and_labels,
    reference,
    variants_of,
)
from benchmarks.work import Work, duration, expected_seconds
from flowturbo.networks.compiled import CannotCompile, StaticGraphs
from flowturbo.networks.precision import autocast
from flowturbo.sampling.solvers import parse_schedule
from flowturbo.system import cli
from flowturbo.transport import FlowTurbo

Name = tuple[str, str]  # variant, schedule


def measure(plan: Plan, best: Roofline, keep: Keep) -> list[Row]:
    """Measure all; prints a line as soon as a row has run once, and tables for each batch size with and without
    decoding. `keep` is given all rows so far, as JSON types, whenever there is more to know.

    Rows that need a compiler are left out, with a line, where there is none.
    """
    networks = build_networks(plan)
    work = Work.of(networks)
    print(f"about {duration(expected_seconds(plan, best, work))}, and what compiling takes\n", flush=True)
    done: list[Row] = []
    for batch_size in plan.batch_sizes:
        for decode in plan.decode:
            torch._dynamo.reset()
            group = Group(plan, best, networks, work, batch_size, decode)
            with torch._inductor.utils.fresh_cache():  # first calls are those of a machine that never compiled this
                rows = group.measure(keep, as_json(done))
            print(f"\n{group}; {best}")
            print(tables(rows), end="\n\n", flush=True)
            if plan.is_papers and (paper := against_paper(rows)):
                print(paper, end="\n\n")
            done += rows
            keep(as_json(done))
    print(LEGEND)
    return done


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows with their ratios, as JSON types."""
    return [{**asdict(row), "ratios": ratios(row, rows)} for row in rows]


@dataclass
class Group:
    """All variants and schedules at one batch size, timed in turn; and in turn the parts that they consist of."""

    plan: Plan
    best: Roofline
    networks: Networks
    work: Work
    batch_size: int
    decode: bool

    def __str__(self) -> str:
        return f"batch {self.batch_size}, {'with' if self.decode else 'without'} decoding"

    @torch.no_grad()
    def measure(self, keep: Keep, before: Sequence[dict[str, Any]]) -> list[Row]:
        """The rows. `keep` is given what is known of them, after the rows before, with each first call and round."""
        plan, known = self.plan, dict[Name, dict[str, Any]]()

        def tell() -> None:
            keep([*before, *known.values()])

        calls = self.first_calls(known, tell)

        def on_round(timings: Mapping[Name, Timing]) -> None:
            for name, timing in timings.items():
                known[name] |= self.times(timing)
            tell()

        timed = partial(interleave, device=plan.device, repeats=plan.repeats, warm_up=plan.warm_up)
        timings = timed(calls, title=str(self), on_round=on_round)
        variants = list(dict.fromkeys(variant for variant, _ in calls))
        parts = self.parts(variants)
        spent = timed(parts, title="parts")
        kernels = bare_seconds(plan, self.networks, self.batch_size)
        return [self.row(name, known[name], timing, spent, kernels) for name, timing in timings.items()]

    def first_calls(
        self, known: dict[Name, dict[str, Any]], tell: Callable[[], object]
    ) -> dict[Name, Callable[[], Tensor]]:
        """Call each once, tell what came of it, and put that into `known`; what is to be timed."""
        z, y = noise_and_labels(self.networks, self.batch_size)
        calls: dict[Name, Callable[[], Tensor]] = {}
        left_out: set[str] = set()
        exact: dict[str, Tensor] = {}
        names = [(variant, schedule) for variant in variants_of(self.plan) for schedule in self.plan.schedules]
        for name in tqdm(names, desc=f"{self}: first calls", unit="call", leave=False, disable=None):
            variant, schedule = name
            if variant in left_out:
                continue
            settings = (schedule, self.plan.cfg_scale, self.decode)
            if schedule not in exact:
                exact[schedule] = reference(self.networks, *settings).sample(z, y)
            run = make(self.networks, variant, *settings, self.batch_size)
            begin = time.perf_counter()
            try:
                run.call()
            except CannotCompile as reason:
                tqdm.write(f"{variant}: left out: {cli.one_line(reason)}")
                left_out.add(variant)
                continue
            first = time.perf_counter() - begin
            once, values = self.timed_once(run)
            difference = error(values, exact[schedule])
            held = peak_memory(without_recording(run), self.plan.device)
            known[name] = {
                **{"variant": variant, "schedule": schedule, "batch_size": self.batch_size, "decode": self.decode},
                **{"first_call": first, "error": asdict(difference), **self.times(once), "rounds": 0},
                "memory": self.networks.weights(variant, self.decode) + held,
            }
            calls[name] = run.call
            tqdm.write(
                f"{variant:<20}{schedule:<9}first call {first:6.1f} s, then about {known[name]['ms']:.4g} ms/image, "
                f"error {difference.rms:.1e}"
            )
            sys.stdout.flush()
            tell()
        return calls

    def timed_once(self, run: Run) -> tuple[Timing, Tensor]:
        """The time of one call, and the values that it made."""
        made: list[Tensor] = []

        def call() -> None:
            made.append(run.values())

        return Timing([stopwatch(self.plan.device)(call)]), made[0]

    def times(self, timing: Timing) -> dict[str, Any]:
        """What a row says of its timed calls."""
        to_ms = 1000 / self.batch_size
        parts = {"ms": timing.median, "p10": timing.quantile(0.1), "p90": timing.quantile(0.9)}
        return {**{name: to_ms * value for name, value in parts.items()}, "rounds": len(timing.seconds)}

    def parts(self, variants: Sequence[str]) -> dict[Name, Callable[[], Tensor]]:
        """What shows the time of an evaluation, by more blocks of one kind, and of decoding; each called once."""
        parts: dict[Name, Callable[[], Tensor]] = {}
        for variant in variants:
            for schedule in (*FEW.values(), *MANY.values()):
                run = make(self.networks, variant, schedule, self.plan.cfg_scale, False, self.batch_size)
                parts[variant, schedule] = run.call
            if self.decode:
                z, _ = noise_and_labels(self.networks, self.batch_size)
                parts[variant, "decode"] = decoding(self.networks, variant, z)
        for call in parts.values():
            call()
        return parts

    def row(
        self,
        name: Name,
        known: Mapping[str, Any],
        timing: Timing,
        spent: Mapping[Name, Timing],
        kernels: float,
    ) -> Row:
        """What there is to say of one variant and schedule. `kernels`: seconds of one block's bare kernels."""
        variant, schedule = name
        predictor, refiner = parse_schedule(schedule).evaluations()
        bare = kernels * (predictor * self.plan.depth + refiner)
        if self.decode:
            bare += spent[variant, "decode"].median
        rate = self.batch_size * self.work.per_image(schedule, self.plan.cfg_scale, self.decode) / timing.median
        to_ms = 1000 / self.batch_size

        def of(network: str, count: int) -> float | None:
            each = evaluation_seconds(network, spent[variant, FEW[network]], spent[variant, MANY[network]])
            return None if each is None else count * each * to_ms

        return Row(
            **{**known, "error": Error(**known["error"])},
            tflops=rate / 1e12,
            of_peak=rate / self.best.of(torch.float32 if variant == FLOAT32 else self.plan.dtype),
            of_kernels=None if variant == FLOAT32 else bare / timing.median,
            predictor_ms=of("predictor", predictor),
            refiner_ms=of("refiner", refiner),
            decode_ms=spent[variant, "decode"].median * to_ms if self.decode else 0.0,
        )


# Schedules with few evaluations of a network and with more: what one takes follows from the difference.
FEW = {"predictor": "H1", "refiner": "H1R1"}
MANY = {"predictor": "H3", "refiner": "H1R4"}


def evaluation_seconds(network: str, few: Timing, many: Timing) -> float | None:
    """Seconds of one evaluation, by the median over the rounds; None where it is lost in the noise."""
    index = ("predictor", "refiner").index(network)
    more = parse_schedule(MANY[network]).evaluations()[index] - parse_schedule(FEW[network]).evaluations()[index]
    differences = Timing([b - a for a, b in zip(few.seconds, many.seconds, strict=True)])
    return differences.median / more if differences.quantile(0.1) > 0 else None


def without_recording(run: Run) -> Callable[[], Tensor]:
    """The call with its kernels launched one by one: the memory of a recorded graph is not counted as it runs."""
    engine = run.sampler.engine if isinstance(run.sampler, FlowTurbo) else None
    if not isinstance(engine, StaticGraphs):
        return run.call

    def call() -> Tensor:
        engine.recording = False
        try:
            return run.call()
        finally:
            engine.recording = True

    return call


def decoding(networks: Networks, variant: str, z: Tensor) -> Callable[[], Tensor]:
    """A variant's decoding alone."""
    decode = networks.autoencoder_of(variant).decode
    if variant.startswith("FlowTurbo"):
        return lambda: decode(z)

    dtype = torch.float32 if variant == FLOAT32 else networks.dtype

    def published() -> Tensor:
        with tf32(), autocast(z.device, dtype):
            return decode(z)

    return published


def bare_seconds(plan: Plan, networks: Networks, batch_size: int) -> float:
    """Seconds that the bare kernels of one block take for a guided batch."""
    predictor = networks.predictor
    block = next(iter(predictor.blocks))
    pieces = kernel_seconds(
        (1 if plan.cfg_scale == 1 else 2) * batch_size,
        predictor.pos_embed.shape[1],
        predictor.width,
        block.attn.num_heads,
        block.mlp.fc1.out_features,
        plan.device,
        plan.dtype,
    )
    print("one block's bare kernels: " + ", ".join(f"{n} {1000 * s:.3g} ms" for n, s in pieces.items()))
    return sum(pieces.values())
