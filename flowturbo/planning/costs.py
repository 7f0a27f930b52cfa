"""What sampling takes on this device: milliseconds of each evaluation, by network and by guidance."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch

from flowturbo.sampling.generate import ImageSampler, Networks
from flowturbo.transport.blocks import BLOCKS, Step
from flowturbo.transport.guidance import Guidance
from flowturbo.transport.path import PATHS
from flowturbo.transport.spec import SamplerSettings, SamplerSpec

_SHORT, _LONG = 2, 6  # blocks of the schedules whose difference is an evaluation's time
_REPEATS = 5


@dataclass(frozen=True)
class Costs:
    """Milliseconds for one image of a batch: of an evaluation by (network, with the null branch), and of the rest, from
    noise to bytes."""

    evaluation: dict[tuple[str, bool], float]
    rest: float
    batch_size: int
    compiled: bool

    def ms(self, spec: SamplerSpec, settings: SamplerSettings) -> float:
        """An image by a schedule."""
        assert spec.schedule is not None
        steps = spec.schedule.plan(settings.refiner_step, spec.schedule.times(*PATHS[settings.path_type].interval))
        return self.rest + sum(self.steps(steps, settings.guidance))

    def steps(self, steps: tuple[Step, ...], guidance: Guidance) -> list[float]:
        """Each step of a trajectory."""
        return [
            sum(self.evaluation[stage.network, at.null] for stage, at in zip(step.block.stages, instants))
            for step, instants in zip(steps, guidance.instants(steps))
        ]

    def table(self) -> str:
        """A line for each kind of block, with guidance and without."""
        how = "compiled" if self.compiled else "eager"
        guided = [null for null in (False, True) if ("predictor", null) in self.evaluation]
        heads = {False: "ms without guidance", True: "ms with guidance"}
        lines = [f"one image of a batch of {self.batch_size}, {how}: {self.rest:.3g} ms, and for each block"]
        lines.append(f"{'block':38}" + "".join(f"{heads[null]:>22}" for null in guided))
        for letter, block in BLOCKS.items():
            counts = {network: block.evaluations(network) for network in ("predictor", "refiner")}
            if any((network, guided[0]) not in self.evaluation for network, n in counts.items() if n):
                continue  # there is no refiner
            ms = [sum(n * self.evaluation.get((name, null), 0.0) for name, n in counts.items()) for null in guided]
            lines.append(f"{letter} {block.name[:34]:36}" + "".join(f"{value:22.3g}" for value in ms))
        return "\n".join(lines) + "\n"


def measure_costs(networks: Networks, settings: SamplerSettings, batch_size: int, compile: bool) -> Costs:
    """Timed in turn on one batch; medians."""
    guided = {False, settings.guidance.scale != 1}
    calls: dict[tuple[str, bool, int], Callable[[], object]] = {}
    for null in sorted(guided):
        always = Guidance(settings.guidance.scale, settings.guidance.channels) if null else Guidance(1.0)
        own = replace(settings, guidance=always, refiner_step="adams")
        for blocks in (_SHORT, _LONG):
            texts = {"predictor": f"A{blocks}", "refiner": f"A{_SHORT}R{blocks}"}
            for network, text in texts.items():
                if network == "predictor" or networks.refiner is not None:
                    calls[network, null, blocks] = caller(networks, text, own, batch_size, compile)
    ms = time_calls(calls, networks.device, batch_size)
    evaluation = {
        (network, null): max(0.0, ms[network, null, _LONG] - ms[network, null, _SHORT]) / (_LONG - _SHORT)
        for network, null, blocks in calls
        if blocks == _LONG
    }
    null = max(guided)
    rest = max(0.0, ms["predictor", null, _SHORT] - _SHORT * evaluation["predictor", null])
    return Costs(evaluation, rest, batch_size, compile)


def caller(
    networks: Networks, spec: str | SamplerSpec, settings: SamplerSettings, batch_size: int, compile: bool
) -> Callable[[], object]:
    """A call that samples a batch, from noise to bytes; made once before, so that it is compiled."""
    sampler = ImageSampler(networks, spec, settings, compile)
    classes = [k % networks.predictor.num_classes for k in range(batch_size)]

    def call() -> object:
        return sampler(0, range(batch_size), classes)

    call()
    return call


def time_calls(calls: dict, device: torch.device, batch_size: int) -> dict:
    """Median milliseconds for one image of each call, all in turn."""
    seconds: dict = {name: [] for name in calls}
    for _ in range(_REPEATS):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - begin)
    return {name: 1000 * median(values) / batch_size for name, values in seconds.items()}


def longest(fits: Callable[[SamplerSpec], bool], most: int = 64) -> int:
    """The largest number of evaluations that fits a budget, of schedules that evaluate once a step; 0 for none."""
    found = 0
    for steps in range(1, most + 1):
        if not fits(SamplerSpec.parse(f"A{steps}")):
            break
        found = steps
    return found
