"""Where else the figures of a run go: TensorBoard's event files, and Weights & Biases."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from flowturbo.system.files import atomic_write


class Board(Protocol):
    """Takes the figures of a run."""

    def add(self, figures: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder. A run that goes on from step `first` hides what an earlier one left after it."""

    def __init__(self, folder: Path, first: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder), purge_step=first + 1 if first else None)

    def add(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of wandb by the name of the run's folder, in the project flowturbo if its own settings name none.

    A run that goes on is the same one there: its id is kept in the folder. `config` holds JSON types.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        import wandb

        place = folder / "wandb-id.txt"
        if not place.exists():
            with atomic_write(place) as file:  # cut off, it would be another run's there
                file.write(secrets.token_hex(4).encode())
        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "flowturbo"),
            name=folder.name,
            id=place.read_text(),
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )

    def add(self, figures: Mapping[str, float], step: int) -> None:
        self.run.log({name: value for name, value in figures.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        self.run.finish()


class Boards:
    """The boards of a run that there are. One that fails is dropped, with a word: it must not end a training.

    `wanted` makes each, by the name of the package that it needs.
    """

    def __init__(self, wanted: Mapping[str, Callable[[], Board]], say: Callable[[str], object]):
        self.say = say
        self.open: dict[str, Board] = {}
        for name, make in wanted.items():
            if find_spec(name) is None:
                say(f"note: {name} is not installed, and gets no figures")
            else:
                self._try(name, partial(self._open, name, make))

    def add(self, figures: Mapping[str, float], step: int) -> None:
        for name, board in list(self.open.items()):
            self._try(name, partial(board.add, figures, step))

    def close(self) -> None:
        for name, board in list(self.open.items()):
            self._try(name, board.close)

    def _open(self, name: str, make: Callable[[], Board]) -> None:
        self.open[name] = make()

    def _try(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # other people's code, disks and servers
            self.open.pop(name, None)
            self.say(f"note: {name} failed and gets no more figures: {type(error).__name__}: {error}")
