"""Sampling blocks in the space of patches, as `flowturbo.networks.compiled` makes graphs of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from flowturbo.models import RunBlock
from flowturbo.transport.blocks import Block, Step, take_step
from flowturbo.transport.branches import Branches, Guided
from flowturbo.transport.editing import Edited, Known
from flowturbo.transport.guidance import Instant


class PatchNetwork(Protocol):
    """What a network offers to be compiled, as SiT and VelocityRefiner do."""

    blocks: Any

    @property
    def null_class(self) -> int: ...

    def to_patches(self, images: Tensor) -> Tensor: ...

    def to_images(self, patches: Tensor) -> Tensor: ...

    def modulations(self, t: Tensor, labels: Tensor) -> Tensor: ...

    def embed(self, *patches: Tensor) -> Tensor: ...

    def transform(self, tokens: Tensor, modulations: Tensor, run: RunBlock) -> Tensor: ...


class Place(NamedTuple):
    """What a graph takes in place of a time: an instant whose time is the conditioning, N rows or with the null branch
    one more; and in an edit what is known then, in patches."""

    instant: Instant
    known: Known | None


def block_step(
    block: Block,
    networks: dict[str, tuple[PatchNetwork, RunBlock]],
    channels: int | str,
    x: Tensor,
    handed: list[Tensor],
    places: list[Place],
    weights: list[list[Tensor | None]],
    scale: Tensor,
    differences: Sequence[Tensor] | None,
) -> tuple[Tensor, list[Tensor], Sequence[Tensor] | None]:
    """One step on states in patches (N, T, p*p, C): the function that is compiled.

    `networks` are those that the block evaluates, and how the blocks of each are run; `places` stand for the times of
    its evaluations. `differences` as in Guided; the last are returned.
    """
    branches = {name: patch_branches(*network) for name, network in networks.items()}
    guided = Guided(branches, scale, channels, -1, differences)
    edited = Edited(guided, lambda place: place.known, lambda place: place.instant)
    if places and places[0].known is not None:
        x, new = take_step(block, weights, places, x, handed, edited.velocity, edited.refine)
    else:
        instants = [place.instant for place in places]
        x, new = take_step(block, weights, instants, x, handed, guided.velocity, guided.refine)
    return x, new, guided.differences


def patch_branches(network: PatchNetwork, run: RunBlock) -> Branches:
    """The branches of a network in the space of patches, its conditioning in place of the time."""

    def branches(x: Tensor, t: Tensor, *velocities: Tensor, null: bool) -> Tensor:
        conditioning, rows = t, len(x)
        if not null:
            return network.transform(network.embed(x, *velocities), conditioning, run).contiguous()
        conditioning = torch.cat([conditioning[:rows], conditioning[rows:].expand(rows, *conditioning.shape[1:])])
        if velocities:
            tokens = network.embed(torch.cat([x, x]), *velocities)
        else:  # both branches start from one state: it is embedded once
            tokens = network.embed(x)
            tokens = torch.cat([tokens, tokens])
        return network.transform(tokens, conditioning, run)

    return branches


def padded(handed: list[Tensor], count: int, x: Tensor, width: int) -> list[Tensor]:
    """As many velocities as the block's steps have at most, with zeros before: then one graph serves them all.

    `width`: the rows of a velocity where none is there.
    """
    rows = len(handed[0]) if handed else width
    # Each a tensor of its own: a graph is made for inputs that are the same or not.
    return [x.new_zeros(rows, *x.shape[1:]) for _ in range(count - len(handed))] + handed


def padded_weights(steps: Sequence[Step]) -> list[list[list[float | None]]]:
    """The weights of each step, of as many velocities as the steps of its block are handed at most: zeros before."""
    widest: dict[Block, Step] = {}
    for step in steps:
        if len(step.takes) >= len(widest.get(step.block, step).takes):
            widest[step.block] = step
    padded = []
    for step in steps:
        most = widest[step.block]
        missing = len(most.takes) - len(step.takes)
        rows = zip(most.weights, step.weights)
        padded.append([[None if w is None else 0.0 for w in full[:missing]] + list(row) for full, row in rows])
    return padded
