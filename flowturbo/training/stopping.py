"""Requests to stop a run: a time limit, and the signals that schedulers and people send."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from types import FrameType

from flowturbo.system.signals import STOPS

EXIT_STOPPED = 75  # stopped by a signal or the time limit, saved, to be resumed: EX_TEMPFAIL of sysexits.h
_ECHO = 1.0  # seconds within which a signal is the same one, sent to the group and passed on by torchrun


class StopRequest:
    """Within it the signals in STOPS ask for a stop at the next step's end instead of ending the process.

    A second signal, later than an echo of the first, ends the process at once; checkpoints are written whole or not
    at all, so that does no harm. `max_hours` asks for a stop by itself. SIGHUP stays ignored where it was, as by nohup.
    """

    def __init__(self, max_hours: float | None = None):
        self.deadline = time.monotonic() + 3600 * max_hours if max_hours else math.inf
        self.signal: str | None = None  # the name of the signal that came
        self._since = -math.inf

    @property
    def wanted(self) -> bool:
        """Whether the run should stop."""
        return self.signal is not None or self.late

    @property
    def late(self) -> bool:
        """Whether the time limit has passed."""
        return time.monotonic() > self.deadline

    def __enter__(self) -> StopRequest:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread take signals
            for number in STOPS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is not None and now - self._since > _ECHO:
            os._exit(128 + number)
        if self.signal is None:
            self.signal, self._since = signal.Signals(number).name, now
