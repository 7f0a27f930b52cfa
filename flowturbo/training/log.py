"""What a training run tells: a progress bar, log.txt, metrics.jsonl, loss.png, and the boards that are installed."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from flowturbo.system.cli import one_line
from flowturbo.training.boards import Board, Boards, TensorBoard, WeightsAndBiases
from flowturbo.training.curves import ERROR, METRICS, PICTURE, draw


class Measured(NamedTuple):
    """What a measurement came to: in words, and by name; `NAME_error` is the standard error of NAME."""

    text: str
    figures: Mapping[str, float]


class RunLog:
    """Rank 0's record of a run in `folder`; with folder None (the other ranks) every call does nothing.

    The bar shows loss, images/s and the remaining time of steps first..total. metrics.jsonl holds a JSON object for
    each time that figures are logged: step, loss, gradient (its norm before clipping), images/s, lr (the learning
    rate) and seconds (since this process began to train); and one for each measurement: step, its figures, seconds. A
    run that goes on from an earlier step appends to it. `config`: what Weights & Biases is told of the run, if it is
    to have the figures.
    """

    def __init__(self, folder: Path | None, total: int, first: int = 0, config: Mapping[str, Any] | None = None):
        self.folder, self.first = folder, first
        if folder is None:
            return
        self.file = open(folder / "log.txt", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self.metrics = open(folder / METRICS, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        interval = 0.1 if sys.stderr.isatty() else 10  # seconds; in a file the bar would be mostly noise
        self.bar = tqdm(
            total=total, initial=first, unit="step", dynamic_ncols=True, smoothing=0.05, mininterval=interval
        )
        wanted: dict[str, Callable[[], Board]] = {"tensorboard": partial(TensorBoard, folder, first)}
        if config is not None:
            wanted["wandb"] = partial(WeightsAndBiases, folder, config)
        self.boards = Boards(wanted, self.say)
        self.draws, self.undrawn = find_spec("matplotlib") is not None, ""
        if not self.draws:
            self.say(f"note: matplotlib is not installed: no {PICTURE}")
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
        self.bar.set_postfix({k: f"{value:.4g}" for k, value in figures.items() if not k.endswith(ERROR)})
        line = " ".join(f"{name}={value:.5g}" for name, value in figures.items())
        self.file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} step={self.step} {line}\n")
        self._record(figures, now, lr=lr)

    def tell(self, measure: Callable[[], Measured]) -> None:
        """What a measurement comes to, and the seconds it took, which are not training's. Raises what it raises."""
        begun = time.perf_counter()
        text, figures = measure()
        now = time.perf_counter()
        self.since += now - begun
        self.say(f"step {self.step}: {text}; {now - begun:.1f} s")
        self._record(figures, now)

    def draw(self, title: str) -> None:
        """Draw loss.png anew. Where that fails, a word is said, once, and the run goes on."""
        if self.folder is None or not self.draws:
            return
        try:
            draw(self.folder, title)
        except Exception as error:  # a broken matplotlib, a full disk: no reason to end a training
            if (why := f"{type(error).__name__}: {one_line(error)}") != self.undrawn:
                self.undrawn = why
                self.say(f"note: {PICTURE} could not be drawn: {why}")

    def _record(self, figures: Mapping[str, float], now: float, **more: float) -> None:
        record = {"step": self.step, **figures, **more, "seconds": round(now - self.begun, 3)}
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self.metrics.write(json.dumps(finite) + "\n")  # after an overflow in fp16 the norm is not
        self.boards.add(figures, self.step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.folder is not None:
            self.boards.close()
            self.bar.close()
            self.file.close()
            self.metrics.close()
