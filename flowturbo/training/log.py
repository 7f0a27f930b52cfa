"""What a training run tells: a progress bar, log.txt, metrics.jsonl, and TensorBoard's scalars if it is installed."""

from __future__ import annotations

import json
import math
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm


class RunLog:
    """Rank 0's record of a run in `folder`; with folder None (the other ranks) every call does nothing.

    The bar shows loss, images/s and the remaining time of steps first..total. metrics.jsonl holds a JSON object for
    each time that figures are logged: step, loss, gradient (its norm before clipping), images/s, lr (the learning
    rate) and seconds (since this process began to train). A run that goes on from an earlier step appends to it.
    """

    def __init__(self, folder: Path | None, total: int, first: int = 0):
        self.folder, self.first = folder, first
        if folder is None:
            return
        self.file = open(folder / "log.txt", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self.metrics = open(folder / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        interval = 0.1 if sys.stderr.isatty() else 10  # seconds; in a file the bar would be mostly noise
        self.bar = tqdm(
            total=total, initial=first, unit="step", dynamic_ncols=True, smoothing=0.05, mininterval=interval
        )
        self.board = _tensorboard(folder)
        self.step, self.images, self.since = first, 0, time.perf_counter()
        self.begun = self.since

    def say(self, text: str) -> None:
        """One line, on the terminal and in the file."""
        if self.folder is not None:
            self.file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")
            self.bar.write(text)

    def advance(self, step: int, images: int) -> None:
        """`step` steps are done; the last took `images` images over all ranks."""
        if self.folder is not None:
            self.images += images
            self.bar.update(step - self.step)
            self.step = step

    def scalars(self, lr: float, **values: float) -> None:
        """Figures of the last step, and the images/s since the last call."""
        if self.folder is None:
            return
        now = time.perf_counter()
        rate = self.images / max(now - self.since, 1e-9)
        self.images, self.since = 0, now
        figures = {**values, "images/s": rate}
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()})
        line = " ".join(f"{name}={value:.5g}" for name, value in figures.items())
        self.file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} step={self.step} {line}\n")
        record = {"step": self.step, **figures, "lr": lr, "seconds": round(now - self.begun, 3)}
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self.metrics.write(json.dumps(finite) + "\n")  # after an overflow in fp16 the norm is not
        if self.board is not None:
            for name, value in figures.items():
                self.board.add_scalar(name, value, self.step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.folder is not None:
            self.bar.close()
            self.file.close()
            self.metrics.close()
            if self.board is not None:
                self.board.close()


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))
