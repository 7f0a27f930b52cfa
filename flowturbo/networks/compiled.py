"""Sample-aware compilation: whole sampling blocks as static graphs.

The graph of a block holds its network evaluations, guidance and the move, in the space of patches. What depends on
time and class alone is computed for the whole trajectory beforehand and handed in; weights and guidance scale are
tensors. So one graph for each letter serves every step and every scale, and all share one set of weights.

On a CPU, where a launch costs next to nothing, the transformer blocks alone are graphs: one serves them all.

Source: FlowTurbo, section 3.4 ("sample-aware compilation").
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
import torch._dynamo
from torch import Tensor

from flowturbo.models import RunBlock, SiT, run_block
from flowturbo.networks.kept_code import kept_code
from flowturbo.networks.patches import PatchNetwork, Place, block_step, padded, padded_weights
from flowturbo.transport.blocks import State
from flowturbo.transport.editing import Known, Source
from flowturbo.transport.guidance import Instant
from flowturbo.transport.samplers import FlowTurbo


class StaticGraphs:
    """The engine of a FlowTurbo whose blocks are static graphs; on CUDA the whole trajectory of a batch shape is
    recorded as one graph, decoding included.

    The first batch of a shape takes longer; what is compiled is kept for later processes. Raises ValueError for
    networks that are no PatchNetwork, and when it samples where this machine cannot compile.
    """

    whole_steps: bool | None = None  # graphs of whole steps, or else of transformer blocks; None: on CUDA

    def __init__(self, sampler: FlowTurbo):
        kept_code()
        self.sampler = sampler
        uses_refiner = sampler.schedule.has_refiner
        self.networks: dict[str, Any] = {"predictor": sampler.predictor}
        if uses_refiner:
            self.networks["refiner"] = sampler.refiner
        for network in self.networks.values():
            if not hasattr(network, "embed"):
                raise ValueError(f"{type(network).__name__} cannot be compiled: expected a SiT or a VelocityRefiner")
        whole = self.networks["predictor"].pos_embed.is_cuda if self.whole_steps is None else self.whole_steps
        self.run = {name: runner(network) for name, network in self.networks.items()}
        self.step = block_step
        if whole:
            self.step = torch.compile(block_step, fullgraph=True, dynamic=False)
        else:
            self.run = dict.fromkeys(self.networks, compiled_block())
        self.recording = True  # on CUDA; False launches the blocks' graphs one by one
        self.recordings: dict[tuple, Callable[..., Tensor]] = {}
        self._shapes: set[torch.Size] = set()  # that have been sampled
        self._numbers: dict[tuple[torch.device, torch.dtype], Numbers] = {}

    def sample(self, z: Tensor, y: Tensor, source: Source | None = None) -> Tensor:
        """Latents, or what the sampler's `decode` makes of them, from noise z (N, C, H, W) and labels y (N,)."""
        result = self._recorded(z, y, source)
        if z.shape not in self._shapes:
            self._shapes.add(z.shape)
            if code := kept_code():
                code.record()  # now, since not every process comes to an orderly end
        return result

    def _recorded(self, z: Tensor, y: Tensor, source: Source | None) -> Tensor:
        """As `_sample`, by a recording of it where there can be one."""
        self._tensors(z)
        if not (z.is_cuda and self.recording):
            return self._sample(z, y, source)
        known = source.tensors() if source is not None else {}
        inputs = (z, y, *known.values())
        key = (z.shape, z.dtype, z.device, *known, source and source.ramp)

        def sample(z: Tensor, y: Tensor, *known: Tensor) -> Tensor:
            return self._sample(z, y, source and source.with_tensors(known))

        with torch.cuda.device(z.device):
            if key not in self.recordings:
                self.recordings[key] = record(sample, inputs)
            return self.recordings[key](*inputs)

    def trajectory(self, z: Tensor, y: Tensor, source: Source | None = None) -> Iterator[State]:
        """The State after each step, as images."""
        to_images = self.sampler.predictor.to_images  # type: ignore[attr-defined]
        for x, velocities in self._steps(z, y, source):
            yield State(to_images(x), tuple(map(to_images, velocities)))

    def _sample(self, z: Tensor, y: Tensor, source: Source | None = None) -> Tensor:
        for state in self._steps(z, y, source):
            final = state.x
        latents = self.networks["predictor"].to_images(final)
        return latents if self.sampler.decode is None else self.sampler.decode(latents)

    def _steps(self, z: Tensor, y: Tensor, source: Source | None = None) -> Iterator[State]:
        """The State after each step, in patches."""
        numbers = self._tensors(z)
        guidance = self.sampler.guidance
        labels = y if source is None else source.all_labels(y)
        conditioning = {name: self._conditioning(name, labels) for name in self.networks}
        state = State(self.networks["predictor"].to_patches(z), ())
        asked = state.x.new_zeros(len(labels), *state.x.shape[1:])  # of the shape that the network is asked for
        differences: Sequence[Tensor] | None = [asked, asked.clone()] if guidance.every > 1 else None
        # A velocity's rows: the network's, and in an edit above them those that move the state.
        width = len(labels) * (1 + (guidance.scale != 1)) + (0 if source is None else len(y))
        for step, instants, rows in zip(self.sampler.steps, numbers.instants, numbers.weights, strict=True):
            handed = [state.velocities[k] for k in step.takes]
            at = []
            for stage, instant in zip(step.block.stages, instants):
                given = conditioning[stage.network][instant.t]
                known = None if source is None else self._known(source, instant.t)
                at.append(Place(instant._replace(t=given if instant.null else given[: len(labels)]), known))
            # A block gets the networks that it evaluates: its graph does not depend on whether there are others.
            names = sorted({stage.network for stage in step.block.stages})
            used = {name: (self.networks[name], self.run[name]) for name in names}
            handed = padded(handed, len(rows[-1]) - len(at), state.x, width)
            with graph_limits(), compiler_errors():
                x, new, differences = self.step(
                    step.block, used, guidance.channels, state.x, handed, at, rows, numbers.scale, differences
                )
            at_hand = (*state.velocities, *new)
            state = State(x, tuple(at_hand[k] for k in step.keeps))
            yield state

    def _known(self, source: Source, t: float) -> Known:
        """What an edit knows at time t, in patches."""
        x, u, m, difference = source.at(self.sampler.path, t)
        to_patches = self.networks["predictor"].to_patches
        return Known(to_patches(x), to_patches(u), None if m is None else to_patches(m), difference)

    def _tensors(self, z: Tensor) -> Numbers:
        """The trajectory's numbers for noise like this, made once: a recording keeps reading them."""
        device, key = z.device, (z.device, z.dtype)
        if key not in self._numbers:
            # On a CPU, Dynamo takes a number in float64 for a Python float, and traces all twice over to see which.
            dtype = torch.float64 if z.dtype == torch.float64 else torch.float32

            def number(value: float | None) -> Tensor | None:
                return None if value is None else torch.tensor(value, dtype=dtype, device=device)

            sampler = self.sampler
            with torch.inference_mode(False):
                self._numbers[key] = Numbers(
                    [[list(map(number, row)) for row in rows] for rows in padded_weights(sampler.steps)],
                    [
                        [instant._replace(weights=tuple(map(number, instant.weights))) for instant in instants]
                        for instants in sampler.guidance.instants(sampler.steps)
                    ],
                    torch.tensor(sampler.guidance.scale, device=device),
                )
        return self._numbers[key]

    def _conditioning(self, name: str, y: Tensor) -> dict[float, Tensor]:
        """A network's modulations at each time that it is evaluated at, all computed in one go: a row for every
        image, and where guided one more for the null class."""
        times = {
            t: self.sampler.guidance.active(t)
            for step in self.sampler.steps
            for stage, t in zip(step.block.stages, step.times)
            if stage.network == name
        }
        network = self.networks[name]
        labels = torch.cat([y, y.new_full((1,), network.null_class)]) if any(times.values()) else y
        # Filled on the device: a copy from the host would wait for it, and cannot be recorded.
        t = torch.stack([torch.full((len(labels),), t, device=y.device) for t in times])
        table = network.modulations(t.flatten(), labels.repeat(len(times))).unflatten(0, t.shape)
        return {t: rows if both else rows[: len(y)] for (t, both), rows in zip(times.items(), table, strict=True)}


class Numbers(NamedTuple):
    """What is known of a trajectory before it is sampled, as tensors."""

    weights: list[list[list[Tensor | None]]]  # as in a Step
    instants: list[list[Instant]]
    scale: Tensor


@torch.compiler.nested_compile_region
def run_as_region(block: Any, tokens: Tensor, modulation: Tensor) -> Tensor:
    """A block's output. Within torch.compile all blocks share the compilation of one."""
    return block(tokens, modulation)


def runner(network: PatchNetwork) -> RunBlock:
    """How a network's blocks are run in a graph: by regions, but for quantised weights, which regions do not know."""
    weights = network.blocks[0].mlp.fc1.weight
    return run_as_region if type(weights.data) is Tensor else run_block


def compiled_block() -> RunBlock:
    """A block's output by a graph of its own, which all blocks of a width share, those of other networks too."""
    graph = torch.compile(run_block, fullgraph=True, dynamic=False)
    # In a layout of its own: that of a row of the whole table differs with the number of blocks.
    return lambda block, tokens, modulation: graph(block, tokens, modulation.contiguous())


def static_graph(network: SiT) -> Callable[..., Tensor]:
    """A network's forward as a static graph, for training; the network itself stays as it is.

    Raises ValueError, when called, where this machine cannot compile.
    """
    kept_code()
    images_in, run = network.images_in, runner(network)
    graph: Callable[..., Tensor] = torch.compile(network.evaluate, fullgraph=True, dynamic=False)

    def call(x: Tensor, t: Tensor, *rest: Any) -> Tensor:
        velocities, conditions = rest[: images_in - 1], rest[images_in - 1 :]
        with graph_limits(), compiler_errors():
            return graph((x, *velocities), t, *conditions, run=run)

    return call


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


def check_compiler(device: torch.device) -> None:
    """Raises CannotCompile where this machine cannot compile for a device: before anything is made, not after."""
    kept_code()
    with compiler_errors():
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))


class CannotCompile(ValueError):
    """This machine has no working compiler."""


@contextmanager
def compiler_errors() -> Iterator[None]:
    """Raises CannotCompile in place of what torch.compile raises where the machine has no working compiler."""
    try:
        yield
    except torch._dynamo.exc.ShortenTraceback as error:  # BackendCompilerFailed, or Inductor's own for want of Triton
        cause = getattr(error, "inner_exception", error)
        lines = said(cause)
        reason = next((line for line in lines if "error: " in line), lines[0])  # a C++ compiler's own words
        raise CannotCompile(
            f"this machine cannot compile (a C++ compiler on CPU, Triton on CUDA are needed): {reason}"
        ) from error


def said(error: BaseException) -> list[str]:
    """The lines of an error's message, or its name where it has none."""
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
