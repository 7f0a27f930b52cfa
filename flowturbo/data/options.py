"""The options of reading images and of caching latents. No torch is imported."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from flowturbo.system.options import option

COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0)}
BACKGROUND_HELP = "what transparent pixels are shown on: white, black or #rrggbb"


@dataclass(frozen=True)
class CachingOptions:
    """How latents are cached. Raises ValueError for impossible values."""

    batch_size: int = option(16, "images encoded at once by each rank")
    shard_size: int = option(4096, "images per file; 64 KiB each at 256 pixels")
    num_workers: int = option(min(4, os.cpu_count() or 1), "loader processes of each rank")
    precision: str = option("fp32", "of the autoencoder", choices=("fp32", "bf16"))

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("shard_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {least}")


def parse_background(background: str) -> tuple[int, int, int]:
    """The colour called "white", "black" or "#rrggbb". Raises ValueError for another text."""
    if background in COLOURS:
        return COLOURS[background]
    if not re.fullmatch("#[0-9a-fA-F]{6}", background):
        raise ValueError(f"background {background!r}: expected white, black or #rrggbb")
    red, green, blue = bytes.fromhex(background[1:])
    return red, green, blue
