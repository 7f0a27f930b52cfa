"""One process or many, one interface: rank, device and the few collectives that the scripts need."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flowturbo.system import cli

Value = TypeVar("Value")
CLOSED = ("Connection closed", "Connection reset", "Broken pipe", "ncclRemoteError")  # another process has ended


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

    def begin_sum(self, value: Tensor) -> Callable[[], None]:
        """Begin `sum`, and go on meanwhile; what is returned waits for its end. All ranks must begin alike."""
        if self.size == 1:
            return lambda: None
        with _together():
            work = dist.all_reduce(value, async_op=True)

        def wait() -> None:
            with _together():
                work.wait()

        return wait

    def agree(self, function: Callable[[], Value]) -> Value:
        """What rank 0's call of the function returns, on every rank; where it raises, every rank raises.

        Mistakes (`cli.MISTAKES`) are raised alike on every rank, so that `cli.run_script` tells them once. For a
        defect of ours the others raise OSError.
        """
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]  # value, error
        cause: Exception | None = None
        if self.is_main:
            try:
                outcome[0] = function()
            except Exception as error:
                cause, outcome[1] = error, _portable(error)
        with _together():
            dist.broadcast_object_list(outcome, src=0, device=self.device)
        if outcome[1] is None:
            return outcome[0]
        with suppress(RuntimeError):
            dist.barrier()  # no rank ends while another has not heard why
        raise cause or outcome[1]

    @contextmanager
    def hold(self, make: Callable[[], AbstractContextManager[Value]]) -> Iterator[Value]:
        """Within it rank 0 holds what the function makes, a lock for example; every rank gets what entering it gives.

        Where entering it raises, every rank raises, as in `agree`.
        """
        with ExitStack() as held:
            yield self.agree(lambda: held.enter_context(make()))


def _portable(error: Exception) -> Exception:
    """What the other ranks raise: the same mistake where pickling keeps it, else one with its message."""
    if not isinstance(error, cli.MISTAKES):
        return OSError(f"rank 0 failed: {type(error).__name__}")
    with suppress(Exception):
        again = pickle.loads(pickle.dumps(error))
        if str(again) == str(error):
            return error
    return ValueError(cli.one_line(error))


@contextmanager
def world(device: str = "auto", timeout: timedelta = timedelta(minutes=30)) -> Iterator[World]:
    """Join torchrun's process group, or be a world of one; leaves it at the end.

    `device` is one of `pick_device`'s. Under torchrun the CUDA device is the local rank; the backend is NCCL on CUDA
    and gloo on the CPU. `timeout` is how long a rank may wait for the others; one that ends early ends all, by
    torchrun's hand. Raises ValueError for a device that is not there.
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
    except Exception:
        raise  # with the group as it is: leaving it would tell the others of the end before its cause is told
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


class LostRanks(OSError):
    """A collective failed, nearly always since another rank has ended."""


@contextmanager
def _together() -> Iterator[None]:
    """Turns what the backend raises in a collective into LostRanks."""
    try:
        yield
    except RuntimeError as error:
        reason = cli.one_line(error)
        if any(sign in reason for sign in CLOSED):  # which names a port and no cause
            reason = "one has ended; its own message, or torchrun's report, tells why"
        raise LostRanks(f"lost the other ranks: {reason[:200]}") from error


def pick_device(device: str, local_rank: int | None = None) -> torch.device:
    """The torch device for "auto", "cpu", "cuda", "cuda:K" or "mps".

    "auto" is CUDA where there is one, else the CPU. With a local rank, CUDA's index is that. Raises ValueError for
    another name, and where the device is not there.
    """
    if not re.fullmatch("auto|cpu|mps|cuda(:[0-9]+)?", device):
        raise ValueError(f"device {device!r} is unknown; expected auto, cpu, cuda, cuda:K or mps")
    kind, _, number = device.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' is not there")
    if kind != "cuda":
        return torch.device(kind)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = local_rank if local_rank is not None else int(number or 0)
    if index >= count:
        raise ValueError(f"device {device!r} (index {index}) is not there: this machine has {count} CUDA devices")
    return torch.device("cuda", index)
