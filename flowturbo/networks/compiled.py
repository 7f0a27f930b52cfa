"""Sample-aware compilation: whole sampling blocks as static graphs.

The graph of a block holds its network evaluations, guidance and solver update, in the space of patches. What depends
on time and class alone is computed for the whole trajectory beforehand and handed in; times and guidance scale are
tensors. So one graph for each letter serves every step and every scale, and all share one set of weights.

Source: FlowTurbo, section 3.4 ("sample-aware compilation").
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch._dynamo
from torch import Tensor

from flowturbo.transport.guidance import Guidance, guide
from flowturbo.transport.integrators import Step, match_rows, take_step

Decode = Callable[[Tensor], Tensor]


class PatchNetwork(Protocol):
    """What a network offers to be compiled, as SiT and VelocityRefiner do."""

    @property
    def null_class(self) -> int: ...

    def to_patches(self, images: Tensor) -> Tensor: ...

    def to_images(self, patches: Tensor) -> Tensor: ...

    def modulations(self, t: Tensor, labels: Tensor) -> Tensor: ...

    def evaluate(self, modulations: Tensor, *patches: Tensor) -> Tensor: ...


class Instant(NamedTuple):
    """A time, and each network's conditioning at it: a row for every image, one more for the null class if guided."""

    t: Tensor
    predictor: Tensor
    refiner: Tensor | None

    def __sub__(self, other: Instant) -> Tensor:
        return self.t - other.t


def block_step(
    block: str,
    refiner_form: str,
    channels: int | str,
    predictor: PatchNetwork,
    refiner: PatchNetwork | None,
    x: Tensor,
    v: Tensor | None,
    t0: Instant,
    t1: Instant,
    scale: Tensor,
) -> Step:
    """One block of a schedule on x and v in patches (N or 2N, T, p*p, C): the function that is compiled."""

    def guided(network: PatchNetwork, conditioning: Tensor, *patches: Tensor) -> Tensor:
        rows = len(patches[0])
        if len(conditioning) == rows:
            return network.evaluate(conditioning, *patches).to(x.dtype).contiguous()
        null = conditioning[rows:].expand(rows, *conditioning.shape[1:])
        both = network.evaluate(torch.cat([conditioning[:rows], null]), *patches).to(x.dtype)
        return guide(both, scale, channels, dim=-1)

    def velocity(x: Tensor, t: Instant) -> Tensor:
        return guided(predictor, t.predictor, x)

    def offset(x: Tensor, t: Instant, v: Tensor) -> Tensor:
        assert refiner is not None
        assert t.refiner is not None
        branches = 1 if len(t.refiner) == len(x) else 2
        return guided(refiner, t.refiner, x, match_rows(v, branches * len(x)))

    return take_step(block, velocity, offset, x, t0, t1, v, refiner_form)


class CompiledTrajectory:
    """The blocks of a schedule as static graphs; on CUDA a batch shape's whole trajectory is recorded as one graph.

    Arguments as FlowTurbo's, `times` being floats. Raises ValueError for networks that are no PatchNetwork.
    """

    def __init__(
        self,
        predictor: Any,
        refiner: Any,
        blocks: str,
        times: Sequence[float],
        guidance: Guidance,
        refiner_form: str,
        decode: Decode | None = None,
    ):
        for network in (predictor, refiner):
            if network is not None and not hasattr(network, "evaluate"):
                raise ValueError(f"{type(network).__name__} cannot be compiled: expected a SiT or a VelocityRefiner")
        self.predictor, self.refiner = predictor, refiner if "R" in blocks else None
        # A leading P evaluates the velocity that it finds missing: it is Heun's step.
        self.blocks = "H" + blocks[1:] if blocks[0] == "P" else blocks
        self.times, self.guidance, self.refiner_form, self.decode = list(times), guidance, refiner_form, decode
        self.step = torch.compile(block_step, fullgraph=True, dynamic=False)
        self.recording = True  # on CUDA; False launches the blocks' graphs one by one
        self.recordings: dict[tuple, Callable[..., Tensor]] = {}

    def sample(self, z: Tensor, y: Tensor) -> Tensor:
        """Latents, or what `decode` makes of them, from noise z (N, C, H, W) and labels y (N,).

        Raises ValueError where this machine cannot compile.
        """
        inputs = (z, y, *self._numbers(z))
        if not (z.is_cuda and self.recording):
            return self._sample(*inputs)
        key = (z.shape, z.dtype, z.device)
        with torch.cuda.device(z.device):
            if key not in self.recordings:
                self.recordings[key] = record(self._sample, inputs)
            return self.recordings[key](*inputs)

    def trajectory(self, z: Tensor, y: Tensor) -> Iterator[Step]:
        """The Step after each block, as images."""
        to_images = self.predictor.to_images
        for x, v in self._steps(z, y, *self._numbers(z)):
            yield Step(to_images(x), None if v is None else to_images(v))

    def _numbers(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Times and guidance scale as tensors on z's device."""
        return torch.tensor(self.times, dtype=torch.float64).to(z.device), torch.tensor(self.guidance.scale).to(z)

    def _sample(self, z: Tensor, y: Tensor, times: Tensor, scale: Tensor) -> Tensor:
        for x, _ in self._steps(z, y, times, scale):
            final = x
        latents = self.predictor.to_images(final)
        return latents if self.decode is None else self.decode(latents)

    def _steps(self, z: Tensor, y: Tensor, times: Tensor, scale: Tensor) -> Iterator[Step]:
        """The Step after each block, in patches."""
        of_predictor = self._conditioning(self.predictor, times, y)
        of_refiner = [None] * len(times) if self.refiner is None else self._conditioning(self.refiner, times, y)
        instants = list(map(Instant, times, of_predictor, of_refiner))
        settings = (self.refiner_form, self.guidance.channels, self.predictor, self.refiner)
        x, v = self.predictor.to_patches(z), None
        for block, t0, t1 in zip(self.blocks, instants[:-1], instants[1:], strict=True):
            with graph_limits(), compiler_errors():
                x, v = self.step(block, *settings, x, v, t0, t1, scale)
            yield Step(x, v)

    def _conditioning(self, network: PatchNetwork, times: Tensor, y: Tensor) -> list[Tensor]:
        """The network's modulations at every time, as Instant has them, all computed in one go."""
        guided = [self.guidance.active(t) for t in self.times]
        labels = torch.cat([y, y.new_full((1,), network.null_class)]) if any(guided) else y
        t = times.float()[:, None].expand(-1, len(labels))
        table = network.modulations(t.flatten(), labels.repeat(len(times))).unflatten(0, t.shape)
        return [rows if both else rows[: len(y)] for rows, both in zip(table, guided, strict=True)]


def record(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
    """The function of CUDA tensors of these shapes as a CUDA graph; where it cannot be recorded, itself.

    Every call copies its inputs into the recording's buffers and returns a copy of its output.
    """
    with torch.inference_mode(False):  # buffers that may be written in any mode
        buffers = [value.clone() for value in inputs]
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, tunes and allocates, none of which may happen while recording
            function(*buffers)
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads write files meanwhile: what they call is no part of it.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            output = function(*buffers)
    except RuntimeError as error:
        torch.cuda.set_stream(before)  # a failed recording may leave its own
        warnings.warn(f"no CUDA graph, sampling goes on without: {said(error)[0]}", stacklevel=2)
        return function

    def replay(*values: Tensor) -> Tensor:
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)
        graph.replay()
        return output.clone()

    return replay


def graph_limits() -> AbstractContextManager:
    """Room for the graphs of many batch shapes, schedules and networks: each has its own, by intention."""
    return torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=2048)


@contextmanager
def compiler_errors() -> Iterator[None]:
    """Raises ValueError in place of what torch.compile raises where the machine has no working compiler."""
    try:
        yield
    except torch._dynamo.exc.ShortenTraceback as error:  # BackendCompilerFailed, or Inductor's own for want of Triton
        cause = getattr(error, "inner_exception", error)
        lines = said(cause)
        reason = next((line for line in lines if "error: " in line), lines[0])  # a C++ compiler's own words
        raise ValueError(
            f"this machine cannot compile (a C++ compiler on CPU, Triton on CUDA are needed): {reason}; "
            "go on without --compile"
        ) from error


def said(error: BaseException) -> list[str]:
    """The lines of an error's message, or its name where it has none."""
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
