"""Steps of predictor training over several ranks: train.py's sums of gradients, and DistributedDataParallel's.

Every rank is a process of this machine. The steps are the same but for how gradients are summed: the same network,
data, optimizer and moving average.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from statistics import median, stdev
from typing import Any
from unittest import mock

import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import interleave, peak_memory
from benchmarks.options import Plan
from flowturbo.configurations import SIT_CONFIGS
from flowturbo.data.loader import Batch
from flowturbo.models import SiT
from flowturbo.networks.autoencoder import NoAutoencoder
from flowturbo.system.distributed import World, world
from flowturbo.training import reduction
from flowturbo.training.build import FrozenNetworks
from flowturbo.training.objective import KeyedDraws, LatentObjective, make_objective
from flowturbo.training.options import DataOptions, Optimisation, PredictorOptions, TrainingOptions
from flowturbo.training.step import State, Update, update

OURS, FLAT = "train.py: buckets while the backward pass runs", "one flat sum after the backward pass"
DDP, VIEWS = "DistributedDataParallel", "DistributedDataParallel, gradients as views"
WAYS = (DDP, VIEWS, FLAT, OURS)


@dataclass
class Row:
    """One way to sum gradients; `ratio` is DistributedDataParallel's time to its own, the median over rounds."""

    way: str
    ranks: int
    batch_size: int  # of each rank
    seconds: float
    p10: float
    p90: float
    ratio: float
    ratio_error: float  # its standard error
    memory: float  # what the gradients take at their peak, over their own bytes
    resumes: bool  # whether a resumed run has the bits of one that was not interrupted
    difference: float  # of the weights after a few steps, the largest, to those of the flat sum


def measure(plan: Plan, ranks: int, threads: int) -> list[Row]:
    """A row for each way and batch size, printed as a table."""
    if plan.device.type == "cuda" and torch.cuda.device_count() < ranks:
        raise ValueError(f"ranks {ranks}: this machine has {torch.cuda.device_count()} CUDA devices")
    rows = []
    for batch_size in plan.batch_sizes:
        speed = _in_ranks(_measure_speed, ranks, plan, batch_size, threads)
        # where freed memory goes back to the system, so that its count is of what is held
        memory = _in_ranks(_measure_memory, ranks, plan, batch_size, threads, MALLOC_MMAP_THRESHOLD_="65536")
        rows += [_row(way, ranks, batch_size, speed, memory) for way in WAYS]
    print(table(rows))
    return rows


def _row(way: str, ranks: int, batch_size: int, speed: dict[str, Any], memory: dict[str, float]) -> Row:
    seconds = speed["seconds"][way]
    ratios = [theirs / ours for theirs, ours in zip(speed["seconds"][DDP], seconds)]
    return Row(
        way=way,
        ranks=ranks,
        batch_size=batch_size,
        seconds=median(seconds),
        p10=sorted(seconds)[len(seconds) // 10],
        p90=sorted(seconds)[-1 - len(seconds) // 10],
        ratio=median(ratios),
        ratio_error=stdev(ratios) / sqrt(len(ratios)) if len(ratios) > 1 else 0.0,
        memory=memory[way],
        resumes=speed["resumes"][way],
        difference=speed["difference"][way],
    )


def _in_ranks(function: Callable[..., Any], ranks: int, *inputs: Any, **environment: str) -> Any:
    """What rank 0 gets from a function of (World, *inputs), in as many new processes as there are ranks."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port, out = free.getsockname()[1], Path(folder) / "out.json"
        free.close()
        with mock.patch.dict(os.environ, environment):
            torch.multiprocessing.spawn(_rank, (function, ranks, port, out, inputs), nprocs=ranks)
        return json.loads(out.read_text())


def _rank(rank: int, function: Callable[..., Any], size: int, port: int, out: Path, inputs: tuple[Any, ...]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    plan, *_, threads = inputs
    torch.set_num_threads(threads)
    with world(plan.device.type) as ranks:
        result = function(ranks, *inputs[:-1])
        if ranks.is_main:
            out.write_text(json.dumps(result))


class Training:
    """A network in training, whose gradients are summed in one of the ways."""

    def __init__(self, way: str, ranks: World, plan: Plan, batch_size: int):
        torch.manual_seed(0)
        shape: dict[str, Any] = {**SIT_CONFIGS[plan.model], "depth": plan.depth}
        model = SiT(input_size=plan.image_size // 8, in_channels=4, num_classes=1000, **shape)
        with torch.no_grad():  # adaLN-Zero's own weights would leave most gradients at zero
            for parameter in model.parameters():
                if parameter.requires_grad and not parameter.any():
                    parameter.normal_(std=0.02)
        options = TrainingOptions(
            "predictor",
            DataOptions(data_path="-"),
            predictor=PredictorOptions(model=plan.model),
            optimisation=Optimisation(global_batch_size=batch_size * ranks.size, clip_grad=1.0, steps=1000),
        )
        self.way, self.ranks, self.optimisation = way, ranks, options.optimisation
        size = 2**62 if way == FLAT else reduction.BUCKET_BYTES  # a bucket that takes every gradient is a flat sum
        with mock.patch.object(reduction, "BUCKET_BYTES", size):
            self.state = State.new(model.to(ranks.device), ranks.device, self.optimisation)
        frozen = FrozenNetworks(None, NoAutoencoder(), ranks.device, plan.dtype)
        self.objective: Any = make_objective(options, frozen, model)
        assert isinstance(self.objective, LatentObjective)
        numbers = range(ranks.rank * batch_size, (ranks.rank + 1) * batch_size)
        draws = KeyedDraws(0, model.input_shape, posterior=False)(numbers)
        labels = torch.tensor([number % 1000 for number in numbers])
        self.batch = Batch(draws.noise.flip(-1), labels, torch.tensor(numbers), draws).to(ranks.device)

    def begin(self) -> Training:
        """The same, ready for steps: DistributedDataParallel takes the mean over the ranks by itself."""
        if self.way in (DDP, VIEWS):
            place = [self.ranks.device.index] if self.ranks.device.type == "cuda" else None
            model = DistributedDataParallel(
                self.state.model, device_ids=place, gradient_as_bucket_view=self.way == VIEWS
            )
            self.objective = replace(self.objective, model=model)
            self.optimisation = replace(self.optimisation, global_batch_size=len(self.batch.labels))
            self.ranks = World(0, 0, 1, self.ranks.device)
        return self

    def step(self) -> Update:
        """One update."""
        return update(self.state, self.ranks, self.batch, self.objective, self.optimisation)

    def backward(self) -> None:
        """The gradients of a step alone."""
        self.state.buckets.backward(self.objective(self.batch).mean(), self.ranks)
        self.state.model.zero_grad(set_to_none=True)

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.state.model.parameters()])


def _measure_speed(ranks: World, plan: Plan, batch_size: int) -> dict[str, Any]:
    """Seconds of a step in each way, round by round, and what the weights have come to."""
    difference, resumes, flat = {}, {}, None
    for way in (FLAT, DDP, VIEWS, OURS):
        straight = Training(way, ranks, plan, batch_size).begin()
        for _ in range(2):
            straight.step()
        resumed = _resumed(straight, ranks, plan, batch_size)
        for _ in range(2):
            straight.step()
            resumed.step()
        ends = straight.weights(), resumed.weights()
        flat = ends[0] if flat is None else flat
        unlike = ranks.sum(torch.tensor(float(not torch.equal(*ends)), device=ranks.device))
        difference[way], resumes[way] = float((ends[0] - flat).abs().max()), not float(unlike)
        del straight, resumed
    trainings = {way: Training(way, ranks, plan, batch_size).begin() for way in WAYS}
    calls = {way: training.step for way, training in trainings.items()}
    timings = interleave(calls, ranks.device, repeats=plan.repeats, warm_up=2, title="steps", wall=True)
    seconds = {way: timing.seconds for way, timing in timings.items()}
    return {"seconds": seconds, "resumes": resumes, "difference": difference}


def _resumed(before: Training, ranks: World, plan: Plan, batch_size: int) -> Training:
    """A new process's training, from what a checkpoint would hold."""
    after, state = Training(before.way, ranks, plan, batch_size), before.state
    after.state.model.load_state_dict(state.model.state_dict())
    after.state.optimizer.load_state_dict(copy.deepcopy(state.optimizer.state_dict()))
    after.state.step = state.step
    return after.begin()


def _measure_memory(ranks: World, plan: Plan, batch_size: int) -> dict[str, float]:
    """Bytes that the gradients take at the peak of a backward pass, or between two, over their own.

    They are what a pass takes more than one on a single rank, which holds every gradient once.
    """

    def peak(way: str, ranks: World) -> int:
        training = Training(way, ranks, plan, batch_size)

        def passes() -> None:
            training.begin()
            for _ in range(3):  # the first two settle what is held on to
                training.backward()

        return peak_memory(passes, ranks.device)

    alone = peak(OURS, World(0, 0, 1, ranks.device))
    parameters = Training(OURS, ranks, plan, batch_size).state.buckets.parameters
    size = sum(p.numel() * p.element_size() for p in parameters)
    return {way: 1 + (peak(way, ranks) - alone) / size for way in WAYS}


def table(rows: list[Row]) -> str:
    head = f"{'way':<48}{'ranks':>6}{'batch':>6}{'s/step':>9}{'p10':>8}{'p90':>8}{'ratio':>7}{'±':>6}{'memory':>8}"
    head += f"{'resumes':>9}{'difference':>12}"
    lines = [head, "-" * len(head)]
    for row in rows:
        lines.append(
            f"{row.way:<48}{row.ranks:>6}{row.batch_size:>6}{row.seconds:>9.3f}{row.p10:>8.3f}{row.p90:>8.3f}"
            f"{row.ratio:>7.3f}{row.ratio_error:>6.3f}{row.memory:>8.2f}{'bits' if row.resumes else 'unlike':>9}"
            f"{row.difference:>12.1e}"
        )
    return "\n".join(lines)
