"""Cache the autoencoder's moments of every image, both flips, so that training never encodes again.

Usage:
  python cache_latents.py SRC DST                                       # SRC: one folder of images per class
  torchrun --nproc_per_node=8 cache_latents.py SRC DST --batch-size 64

DST then takes the place of SRC as train.py's --data-path. Interrupted? Run the same command again; only missing or
damaged shards are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flowturbo.data.options import BACKGROUND_HELP, CachingOptions, parse_background
from flowturbo.system import cli
from flowturbo.system.options import option


@dataclass(frozen=True)
class Options:
    """What is cached. Raises ValueError for impossible values."""

    source: str = option(
        help="one folder of images per class, or packed files (zip, tar, parquet)", metavar="SRC", positional=True
    )
    destination: str = option(help="folder for the latents", metavar="DST", positional=True)
    vae_ckpt: str = option("vae-ema", "autoencoder: an alias, a hub id or a local folder", metavar="NAME")
    image_size: int = option(256, "side of the square crop")
    background: str = option("white", BACKGROUND_HELP, metavar="COLOUR")
    device: str = option("auto", "auto, cuda or cpu; under torchrun each rank takes its own")

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size {self.image_size} must be at least 1")
        if self.vae_ckpt == "none":
            raise ValueError("vae_ckpt 'none' has no latents to cache")
        parse_background(self.background)


def main(argv: Sequence[str] | None = None) -> None:
    kinds = {"what to cache": Options, "encoding": CachingOptions}
    options, caching = cli.parse(cli.new_parser(__doc__), argv, kinds)

    from flowturbo.data.caching import cache_latents
    from flowturbo.data.packed import open_images
    from flowturbo.data.walk import describe
    from flowturbo.networks.autoencoder import Autoencoder, load_autoencoder
    from flowturbo.system.distributed import world

    with world(options.device) as ranks:
        data = open_images(options.source, options.image_size, background=options.background)
        if ranks.is_main:
            for note in filter(None, (describe(data.skipped), data.note)):
                print(f"note: {note}")
        autoencoder = load_autoencoder(options.vae_ckpt, ranks.device)
        assert isinstance(autoencoder, Autoencoder)
        done = cache_latents(data, autoencoder, options.vae_ckpt, options.destination, caching, ranks)
        if ranks.is_main:
            rate = f", {ranks.size * done.images / done.seconds:.1f} images/s" if done.images else ""
            count = f"{len(data)} images in {len(data.classes)} classes"
            print(f"{count}: {options.destination}{rate}; pass it as --data-path to train.py")


if __name__ == "__main__":
    cli.run_script(main)
