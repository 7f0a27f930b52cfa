"""What a benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Plan:
    """The networks by name and size, what is done with them, and how often."""

    device: torch.device
    dtype: torch.dtype
    model: str
    depth: int
    image_size: int
    batch_sizes: tuple[int, ...]
    schedules: tuple[str, ...]
    decode: tuple[bool, ...]  # without, with, or both
    cfg_scale: float
    repeats: int

    def __str__(self) -> str:
        size = f"{self.image_size} x {self.image_size} pixels"
        return f"{self.model} with {self.depth} blocks, {size}, {self.dtype}, cfg {self.cfg_scale:g}"

    @property
    def warm_up(self) -> int:
        """Rounds before those that are timed, after a first call of everything."""
        return 3 if self.device.type == "cuda" else 0
