"""The signals that ask a process to stop in good order."""

from __future__ import annotations

import signal

# What schedulers send, a person, a terminal that is closed, and SLURM before its time limit (--signal=USR1@120).
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
