"""A loader whose workers end with their parent, hear no signal, and whose failures have a name and come in time."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.queues import Queue
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from flowturbo.system.cli import EndedEarly, one_line
from flowturbo.system.signals import STOPS

LONGEST_WAIT = 1800  # seconds for one batch
CHECK = 3  # seconds between looks whether the workers are alive
EXIT_DESCRIPTORS, EXIT_SHARED_MEMORY = 71, 74  # of workers that cannot send a batch
CAUSES = {  # why a loader fails by no fault of the data
    "descriptors": "the loader has run out of file descriptors",
    "shared memory": "the loader has run out of shared memory (/dev/shm)",
    "killed": "a loader worker was killed, as machines do that run out of memory",
    "waiting": f"a loader worker has given no batch for {LONGEST_WAIT // 60} minutes",
}
EXITS = {  # exit codes of workers
    EXIT_DESCRIPTORS: "descriptors",
    EXIT_SHARED_MEMORY: "shared memory",
    -signal.SIGBUS: "shared memory",  # a page of it that was promised is not there
    -signal.SIGKILL: "killed",
}
TIMED_OUT = "DataLoader timed out"
SIGNS = {  # what torch's errors say
    "descriptors": ("Too many open files", "ancdata"),
    "shared memory": ("shared memory", "unable to write to file"),
    "waiting": (TIMED_OUT,),
}
_PR_SET_PDEATHSIG = 1  # of sys/prctl.h

Item = TypeVar("Item")


class Loader(DataLoader):
    """A loader whose workers hear no signal before they have left the parent's group, to be read with `items`."""

    def __init__(self, dataset: Dataset, workers: int, device: torch.device, **settings: Any):
        super().__init__(
            dataset,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=_begin_worker,
            timeout=CHECK if workers else 0,
            **settings,
        )

    def __iter__(self) -> Any:
        before, on_child = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS), signal.getsignal(signal.SIGCHLD)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if threading.current_thread() is threading.main_thread():  # torch's would raise in the middle of an update
                signal.signal(signal.SIGCHLD, on_child)


def items(batches: Iterable[Item]) -> Iterator[Item]:
    """What a loader gives. Raises LoaderFailed where it fails by no fault of the data, else what reading has raised."""
    source: Iterator[Item] | None = None
    limit = time.monotonic() + LONGEST_WAIT
    while True:
        try:
            source = iter(batches) if source is None else source
            item = next(source)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if TIMED_OUT in str(error) and time.monotonic() < limit:
                continue  # every CHECK seconds, while all workers live; asking again is right
            workers = getattr(source, "_workers", ())
            if isinstance(error, (ConnectionError, EOFError)):  # of a worker that is ending
                ended = wait([worker.sentinel for worker in workers], CHECK)
                for worker in workers:
                    if worker.sentinel in ended:  # which closes a moment before there is an exit code
                        worker.join(CHECK)
            failure = LoaderFailed.of(error, [worker.exitcode for worker in workers])
            raise (failure if failure.cause else error) from None
        yield item
        limit = time.monotonic() + LONGEST_WAIT


class LoaderFailed(EndedEarly):
    """Training samples could not be read on; `cause` is one of CAUSES, or empty for bad data."""

    def __init__(self, message: str, cause: str = ""):
        super().__init__(message)
        self.cause = cause

    @classmethod
    def of(cls, error: Exception, exits: Sequence[int | None] = ()) -> LoaderFailed:
        """What to tell of an error that a loader has raised, whose workers have these exit codes."""
        said = str(error)
        cause = next((EXITS[code] for code in exits if code in EXITS), "")
        cause = cause or next((cause for cause, signs in SIGNS.items() if any(sign in said for sign in signs)), "")
        return cls(CAUSES.get(cause) or one_line(error), cause)


def _begin_worker(worker: int) -> None:
    # torchrun and terminals signal the whole process group; without its loader the parent could not finish its step.
    # In a group of its own a worker hears of neither, but still ends by SIGTERM when the parent sends it.
    os.setpgrp()
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)  # forgets what came before
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    if sys.platform == "linux":  # it ends with its parent however that ends, and seconds before it would notice
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # A batch that cannot be sent would be dropped with a traceback, and the parent would wait for it.
    Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


def _end_worker(error: Exception, sent: object) -> None:
    descriptors = "Too many open files" in str(error)
    os._exit(EXIT_DESCRIPTORS if descriptors else EXIT_SHARED_MEMORY)
