"""One process or many, one interface: rank, device and the few collectives that the scripts need."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flowturbo.system import cli

Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """The processes of a run; without torchrun a world of one, in which every collective does nothing."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes and prints."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """This rank's contiguous part of range(total); the parts differ by at most one."""
        return range(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            with _together():
                dist.barrier()

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, on every rank; in place."""
        if self.size > 1:
            with _together():
                dist.all_reduce(value)
        return value

    def agree(self, function: Callable[[], Value]) -> Value:
        """What rank 0's call of the function returns, on every rank; where it raises, every rank stops.

        The error is raised on rank 0 alone, so that it is told once; the others leave with exit code 2.
        """
        if self.size == 1:
            return function()
        box: list[Any] = [None, None]
        failure = None
        if self.is_main:
            try:
                box[0] = function()
            except Exception as error:
                failure, box[1] = error, str(error)
        with _together():
            dist.broadcast_object_list(box, src=0, device=self.device)
        if failure is not None:
            raise failure
        if box[1] is not None:
            time.sleep(2)  # rank 0 tells the error first; torchrun ends all at the first exit
            sys.exit(2)
        return box[0]


@contextmanager
def world(device: str = "auto", timeout: timedelta = timedelta(minutes=30)) -> Iterator[World]:
    """Join torchrun's process group, or be a world of one; leaves it at the end.

    `device` is "auto" (CUDA where there is one), "cuda" or "cpu", or "cuda:K" for a world of one. Under torchrun
    the CUDA device is the local rank; the backend is NCCL on CUDA and gloo on the CPU. `timeout` is how long a
    rank may wait for the others; one that dies ends all at once anyway, by torchrun's hand.
    Raises ValueError for a device that is not there.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    place = pick_device(device, local_rank if "LOCAL_RANK" in os.environ else None)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        yield World(0, 0, 1, place)
        return
    with _together():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=timeout)
    try:
        yield World(rank, local_rank, size, place)
    finally:
        dist.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    """What the backend raises in a collective, as the end of another rank that it nearly always is."""
    try:
        yield
    except RuntimeError as error:
        reason = cli.one_line(error)[:200]
        raise cli.Aftermath(
            f"lost the other ranks, one of which has ended: its message tells why ({reason})"
        ) from error


def pick_device(device: str, local_rank: int | None = None) -> torch.device:
    """The torch device for "auto", "cpu", "cuda", "cuda:K", "mps"; with a local rank, CUDA's index is that.

    Raises ValueError where the device is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is unknown; expected auto, cpu, cuda or cuda:K") from None
    if place.type != "cuda":
        if place.type == "mps" and not torch.backends.mps.is_available():
            raise ValueError("device mps is not available here")
        return place
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = local_rank if local_rank is not None else place.index or 0
    if index >= count:
        raise ValueError(f"device {device!r} (index {index}) is not there: this machine has {count} CUDA devices")
    return torch.device("cuda", index)
