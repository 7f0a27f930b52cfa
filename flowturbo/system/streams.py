"""Standard streams that never end the work: what is written after a reader or a terminal has gone is dropped."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any

GONE = frozenset((errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO))  # nobody reads any more, which is no failure
lost: dict[str, OSError] = {}  # the first write of each stream that failed otherwise, as of a full disk


class _Lasting(io.FileIO):
    """A descriptor whose failing writes count as done."""

    stream = ""

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in GONE:
                lost.setdefault(self.stream, error)
            return len(data)


def keep_streams() -> None:
    """Make stdout and stderr outlive their readers, and open what was closed, as by `>&-`, on the null device.

    A closed descriptor would be taken by the next file that is opened, a checkpoint for example, and what is printed
    would go there. Streams that something else stands for, as in tests and notebooks, are left alone.
    """
    for number in (0, 1, 2):
        _reopen(number)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        with suppress(OSError, ValueError, AttributeError):  # one without a descriptor
            if stream is None or (stream.fileno() == number and not isinstance(_raw_of(stream), _Lasting)):
                setattr(sys, name, _lasting(number, name, stream))


def _raw_of(stream: Any) -> Any:
    return getattr(stream.buffer, "raw", stream.buffer)  # `python -u` has no buffer between


def _reopen(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
        os.set_inheritable(number, True)


def _lasting(number: int, name: str, stream: Any) -> io.TextIOWrapper:
    """A stream on the descriptor, buffered and encoded as `stream` is."""
    raw = _Lasting(number, "wb", closefd=False)
    raw.stream = name
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace")
    stream.flush()
    buffer: Any = io.BufferedWriter(raw) if isinstance(stream.buffer, io.BufferedWriter) else raw
    return io.TextIOWrapper(
        buffer,
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
